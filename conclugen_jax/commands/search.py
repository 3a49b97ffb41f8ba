"""Search for hyper-parameters of pretraining.

conclugen search --config=demo --data=DATA/NAME/VERSION --search=SEARCH --trials=40

Repeat the same command to resume, with more --trials if you like; start it on several terminals or machines (or with
--workers=2) to share the trials of one folder. SEARCH/result.json names the best values and the command that pretrains
with them; SEARCH/trials/NNNN is the workdir of each trial; the best one keeps its checkpoints. Ctrl-C or SIGTERM saves a
checkpoint first.

--space=FILE.json replaces the default search space around the values of --config:
{"optimizer.learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}, "model.projection_dim": {"choices": [256, 512]}}
"""

import functools

from conclugen_jax.commands import app

command = app.Command(config="run", short=app.OF_PRETRAINING)
FLAGS = command.flags
command.string("search", None, "Folder of search.sqlite, result.json, trials; default: runs/search_CONFIGURATION")
command.integer("trials", 40, "Finished, pruned and failed together; default 40 (the authors: 200)", lower_bound=1)
OBJECTIVES = "pretraining_loss (default; no label) or validation_probe (logistic regression, one class per example)"
command.string("objective", "pretraining_loss", OBJECTIVES)
command.string("space", None, "JSON file of what is searched; default: sizes, loss weights, clusters, rates")
command.integer("workers", 1, "Processes that share the trials, default 1", lower_bound=1)
app.choose_engine(command)

SHOWN = 10  # rows of the table


def main() -> None:
    """Run trials, then show the best ones."""
    app.refuse_downstream(command.config_name)
    from conclugen_jax.study import search, search_space, sharing

    folder = FLAGS.search or f"runs/search_{command.config_name}"
    space = {"space": search_space.read(FLAGS.space) if FLAGS.space else None, "source": FLAGS.space or ""}
    options = {"num_trials": FLAGS.trials, "objective": FLAGS.objective, "arguments": command.config_arguments, **space}
    search_all = functools.partial(search.search, command.config, folder, **options)
    with app.engine(command) as engine:
        if FLAGS.workers > 1 or FLAGS.engine != "local":
            sharing.share(FLAGS.workers, search_all, folder, engine)
    result = search_all()
    objective = result["objective"]
    finished = [t for t in result["trials"] if t["state"] == "finished"]
    finished.sort(key=lambda t: t["value"], reverse=objective["direction"] == "maximize")
    rows = []
    for t in finished[:SHOWN]:
        searched = ", ".join(f"{key.split('.')[-1]} {search.short(value)}" for key, value in t["overrides"].items())
        rows.append([str(t["number"]), f"{t['value']:.6g}", searched])
    titles = {"title": f"{objective['name']}, {objective['direction']}", "caption": objective["meaning"]}
    app.show(("trial", "value", "values searched"), rows, wide=2, **titles)
    for t in result["trials"]:
        if t["error"]:
            print(f"trial {t['number']} failed: {t['error']}")
    counts = ", ".join(f"{count} {state}" for state, count in result["num_trials"].items() if count)
    print(f"{counts}; saved as {folder}/result.json")
    if result["best"]:
        print(f"best, with checkpoints: {result['best']['workdir']}\nagain: {result['command']}")
