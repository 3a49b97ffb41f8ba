"""Prepare the environment of a command: ignore variables that change numbers, and name those whose values cannot be used.

Results depend on the configuration alone, so that a run resumes bit for bit in whatever environment its command is repeated.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from conclugen_jax.errors import ConclugenError, did_you_mean, reason

CACHE = "JAX_COMPILATION_CACHE_DIR"
CACHED_FROM = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
PLATFORMS = "JAX_PLATFORMS", "JAX_PLATFORM_NAME"
SHARES = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
DEVICES = "cpu", "gpu", "cuda", "rocm", "tpu"  # kinds that JAX has names for
USED = re.compile(
    r"JAX_(PLATFORM.*|(NUM_)?CPU_.*|\w+_VISIBLE_DEVICES|PJRT_.*|CROSS_HOST_.*|CHECK_PROXY_.*|"
    r".*(CACHE|SHARE_BINARY|TRACEBACK|TIMEOUT)(_.*)?|(RAISE|LOG|LOGGING|DEBUG_LOG|DISTRIBUTED_DEBUG|COMPILER_DETAILED|"
    r"EXPLAIN|DUMP|INCLUDE|CAPTURED|TRACER|SOURCE|PPRINT)(_.*)?)"
)
"""Variables of JAX's options that commands leave to JAX: devices, compiled programs, messages. All others are ignored."""
INSTEAD = {
    "JAX_DEBUG_NANS": "; conclugen pretrain has --debug_nans",
    "JAX_DEFAULT_MATMUL_PRECISION": "; runs have --config.precision",
}
"""Ignored variable -> what does the same."""

OPTIONS = re.compile("(JAX|JAX2TF|FLAX|NNX)_.*|CHECK_VMA|EAGER_CONSTANT_FOLDING|NVIDIA_TF32_OVERRIDE")
"""Variables that JAX and Flax read as options, and one of cuBLAS that changes the precision of matrix products."""

CARRIED = re.compile(
    rf"(?!{CACHE}|.*_VISIBLE_DEVICES|JAX_LOCAL_DEVICE_IDS)((XLA|TF)_.*|(OMP|MKL|OPENBLAS)_NUM_THREADS|{OPTIONS.pattern})"
)
"""Variables that a task finds on another machine as on this one: no folders, and no devices, which are given out there."""

_FRACTION = r"\d*\.?\d+", "a share of a GPU's memory such as 0.75"
_NUMBER, _SWITCH, _DEVICES = (r"\d+", "a whole number"), ("[01]", "0 or 1"), (r"all|\d+(,\d+)*", "numbers such as 0,1")
FORMS = {
    **dict.fromkeys(SHARES, _FRACTION),
    "XLA_PYTHON_CLIENT_ALLOCATOR": ("(?i)default|platform|bfc|cuda_async|vmm", "platform, bfc, cuda_async or vmm"),
    "XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB": _NUMBER,
    "XLA_PYTHON_CLIENT_ABORT_COLLECTIVES_ON_FAILURE": _SWITCH,
    "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT": _SWITCH,
    "JAX_NUM_CPU_DEVICES": (r"-1|[1-9]\d*", "a number from 1"),
    "JAX_CUDA_VISIBLE_DEVICES": _DEVICES,
    "JAX_ROCM_VISIBLE_DEVICES": _DEVICES,
    "JAX_LOCAL_DEVICE_IDS": _DEVICES,
    **dict.fromkeys(("LOKY_MAX_CPU_COUNT", "LOKY_MAX_DEPTH", "SOURCE_DATE_EPOCH"), _NUMBER),
    **dict.fromkeys(("SKLEARN_WORKING_MEMORY", "SKLEARN_PAIRWISE_DIST_CHUNK_SIZE"), _NUMBER),
    "JOBLIB_MULTIPROCESSING": _SWITCH,
    "JOBLIB_START_METHOD": ("fork|spawn|forkserver|loky", "fork, spawn, forkserver or loky"),
    **dict.fromkeys(("TFDS_RETRY_TRIES", "TFDS_RETRY_INITIAL_DELAY", "TFDS_RETRY_DELAY_MULTIPLIER"), _NUMBER),
    "TFDS_RETRY_NOISE": (r"\d*\.?\d+", "a number"),
}
"""Variable that a library reads on a GPU alone, or does not name in its error -> pattern of its values, and their meaning."""

notes: list[str] = []
"""What :func:`prepare` has changed, a sentence each; complete after :func:`changes`."""
_ignored: dict[str, str] = {}  # variables that were taken out of the environment


def prepare(*, with_jax: bool) -> None:
    """Check and change the environment of this process and its children, before JAX is imported.

    ``with_jax``: whether JAX will be needed. Where a program has imported it before, its options stay as they are.

    Raises:
      ConclugenError: the value of a variable cannot be used.
    """
    notes.clear()
    for name, (pattern, meaning) in FORMS.items():
        if (value := os.environ.get(name)) == "":
            del os.environ[name]  # as a shell writes it that has no value for it
        elif value and not re.fullmatch(pattern, value):
            raise ConclugenError(f"{name}={value}: expected {meaning}; correct or unset it")
    if all(map(os.environ.get, SHARES)):
        raise ConclugenError(f"{' and '.join(SHARES)} are both set; unset one of them")
    os.umask(mask := os.umask(0o22))
    if mask & 0o700:
        raise ConclugenError(f"umask {mask:04o}: this user could not use the files of the command; set umask 0022")
    if with_jax:
        _keep_programs()
    if with_jax and "jax" not in sys.modules:
        _check_flags()
        for name in sorted(os.environ):
            if OPTIONS.fullmatch(name) and not USED.fullmatch(name):
                _ignored[name] = os.environ.pop(name)


def changes() -> list[str]:
    """Return a sentence for each change of :func:`prepare`; imports JAX where it has ignored an option."""
    while _ignored:
        import jax

        name, value = _ignored.popitem()
        if name.startswith("JAX") and name.lower() not in jax.config.values:
            os.environ[name] = value  # no option of JAX
        elif not _says(value, jax.config.values.get(name.lower())):
            way_out = INSTEAD.get(name, "")
            notes.append(f"{name}={value} is ignored: results of commands do not depend on it{way_out}")
    return sorted(notes)


def fault(error: BaseException) -> str:
    """Return which variable has caused an exception of a library, and the way out; empty: none is known."""
    text = str(error)
    if found := re.search(r"(?i)invalid (?:truth |integer )?value.* for (?:environment|JAX flag) '?(\w+)", text):
        return _refused(found[1].upper())
    if found := re.search(r"(?:invalid literal for int\(\).*|could not convert string to float): '(.*)'$", text):
        for name in filter(OPTIONS.fullmatch, os.environ):
            if os.environ[name] == found[1]:
                return _refused(name)
    if "is not a valid value for backend" in text and "MPLBACKEND" in os.environ:
        return f"MPLBACKEND={os.environ['MPLBACKEND']}: matplotlib has no such backend; unset it"
    places = traceback.extract_tb(error.__traceback__)
    no_backend = isinstance(error, AssertionError) and places and places[-1].filename.endswith("xla_bridge.py")
    if not no_backend and not re.search("Unable to initialize backend|Unknown backend", text):
        return ""
    why = reason(error).partition(" (set ")[0].partition(" (you may ")[0].rstrip(".")
    why = "JAX finds no such device here" + (f" ({why})" if text else "")
    for name in PLATFORMS:
        if value := os.environ.get(name):
            if wrong := [part for part in value.split(",") if part not in DEVICES]:
                return f"{name}={value}: {why}; correct or unset it{did_you_mean(wrong[0].lower(), DEVICES)}"
            extra = "tpu" if "tpu" in value else "cuda"
            return f"{name}={value}: {why}; unset it, or install JAX for it: pip install 'conclugen_jax[{extra}]'"
    return f"{why}; correct its driver, or set JAX_PLATFORMS=cpu"


def carried() -> dict[str, str]:
    """Return the variables that a task takes along to another machine."""
    return {name: value for name, value in os.environ.items() if CARRIED.fullmatch(name)}


def carry(variables: dict[str, str]) -> None:
    """Set up this process for a task of another machine, before JAX is imported."""
    for name in carried():
        del os.environ[name]
    os.environ.update(variables)
    prepare(with_jax=True)


def share_memory(share: float) -> None:
    """Let JAX take a share of a GPU's memory, unless the user has said how much."""
    if not any(map(os.environ.get, SHARES)):
        os.environ[SHARES[0]] = f"{share:.3f}"


def refuse_missing_devices() -> None:
    """Refuse devices that the environment names and that are not there, before several workers find out.

    Another process tries them, since a GPU's memory that this process takes would be lost to its workers.
    """
    if all(os.environ.get(name, "") in ("", "cpu") for name in PLATFORMS):
        return
    from conclugen_jax.system.pool import Pool  # late: most commands do without

    with Pool(1) as pool:
        if sentence := pool.submit(_missing_devices).result():
            raise ConclugenError(sentence)


def _missing_devices() -> str:
    try:
        import jax

        jax.devices()
        return ""
    except Exception as e:  # JAX raises several kinds
        return fault(e) or reason(e)


def _refused(name: str) -> str:
    return f"{name}={os.environ.get(name)}: {name[: name.index('_')]} takes no such value; correct or unset it"


def _keep_programs() -> None:
    """Let JAX keep compiled programs, so that a repeated command starts at once.

    Each machine has a folder of its own, since programs hold its machine code.
    """
    given = os.environ.get(CACHE)
    if given == "" or "://" in (given or ""):  # none, or a folder in a cloud
        return
    try:
        place = given or os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        folder = Path(place) if given else Path(place, "conclugen_jax", platform.node() or "host")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            os.environ[CACHE] = str(folder)
            os.environ.setdefault(CACHED_FROM, "0")
    except (OSError, RuntimeError) as e:  # RuntimeError: the user has no home
        os.environ[CACHE] = ""
        shown = f"{CACHE}={given}" if given else "the cache of compiled programs"
        why = getattr(e, "strerror", None) or reason(e).rstrip(".")
        notes.append(f"{shown} cannot be written ({why}), so programs are compiled each time; set {CACHE} to a folder")


def _says(value: str, default: object) -> bool:
    """Return whether the text of a variable is the default of its option."""
    words = {True: ("y", "yes", "t", "true", "on", "1"), False: ("n", "no", "f", "false", "off", "0")}
    if isinstance(default, bool):
        return value.lower() in words[default]
    return value == str(getattr(default, "value", default))


def _check_flags() -> None:
    """Refuse flags that XLA does not know: they would end the process from C++, so another one tries them."""
    if not (flags := os.environ.get("XLA_FLAGS")):
        return
    code = "from jaxlib import _jax; _jax.CompileOptions().executable_build_options.debug_options"
    shown, options = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0"}, {"capture_output": True, "errors": "replace"}
    tried = subprocess.run([sys.executable, "-c", code], env=shown, check=False, **options)
    if tried.returncode and "Traceback" not in tried.stderr:  # which would be that of a jaxlib with other names
        said = re.search(r"(?m)^[EF]\d+ .*?\] (.*)", tried.stderr)
        raise ConclugenError(f"XLA_FLAGS={flags}: {said[1] if said else 'XLA refuses them'}; correct or unset it")
    if re.search("fast_math|excess_precision|dependent_math|ftz", flags):
        notes.append(f"XLA_FLAGS={flags} may change the numbers of a run; resume it with the same flags")
