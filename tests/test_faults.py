"""Every group of the fault suite tries a fault or two; ``make faults`` is the long form."""

import pytest

from faults import fuzz, groups, harness
from tests.helpers import QUICK_COMPILATION

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return harness.Place(tmp_path_factory.mktemp("faults"), 7, QUICK_COMPILATION)


# Orbax abandons what it was reading when a file of a checkpoint is damaged; the rest of it finds its event loop closed.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", groups.GROUPS)
def test_nothing_is_lost(place, name):
    group, _ = groups.GROUPS[name]
    for tally in group(place, 1.0):
        assert not tally.lost, (tally.fault, tally.lost)
        assert tally.tried or name in ("signals", "disk"), tally.fault  # one of two kinds; no mount allowed


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_what_is_fuzzed_is_read_where_nothing_was_changed(place, tmp_path, kind):
    file = fuzz.target(kind, tmp_path, place.folder / "whole")
    file.path.write_bytes(file.valid)
    file.read()  # raises nothing
    assert file.valid


def test_what_is_lost_is_seen(place, tmp_path):
    damaged = dict(place.expected)
    key = next(k for k in damaged if k.startswith("state/params"))
    damaged[key] = damaged[key].copy()
    damaged[key].flat[0] += 1e-7
    assert harness.differences(damaged, place.expected) == [key]
    assert harness.refusal(2, "error: no") == "refused"
    assert not harness.refusal(1, "error: no")
    assert not harness.refusal(2, "Traceback (most recent call last):\nerror: no")
    tally = harness.Tally("x")
    for outcome in ("survived", "refused", "run1: differs"):
        tally.count(outcome)
    assert (tally.tried, tally.survived, tally.refused, tally.lost) == (3, 1, 1, ["run1: differs"])
    assert "| x | 3 | 1 | 1 | 1 |" in harness.table([tally])
