"""The demo's two methods side by side: the output of one after the other's, and the exit code of the first that fails."""

from conclugen_jax.commands import demo

SMALL, UNKNOWN = ("configs", "small"), ("configs", "no_such_configuration")


def test_the_other_process_is_heard_after_this_one(capsys):
    assert demo._side_by_side([("completion", "bash")], [SMALL]) == 0
    said = capsys.readouterr()
    assert said.out.index("complete") < said.out.index("conclugen configs small") < said.out.index("def get_config")
    assert "conclugen completion bash" in said.err


def test_the_one_that_fails_ends_the_demo(capsys):
    assert demo._side_by_side([UNKNOWN, SMALL], [SMALL]) == 2
    assert "def get_config" not in capsys.readouterr().out
    assert demo._side_by_side([("completion", "bash")], [UNKNOWN, SMALL]) == 2
    said = capsys.readouterr().out
    assert "error: " in said
    assert "def get_config" not in said
