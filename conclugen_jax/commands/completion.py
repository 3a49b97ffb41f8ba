"""Print a script that completes commands, flags and configuration keys.

conclugen completion bash > ~/.local/share/bash-completion/completions/conclugen
conclugen completion fish > ~/.config/fish/completions/conclugen.fish
conclugen completion zsh > ~/.conclugen.zsh      and in ~/.zshrc, after compinit: source ~/.conclugen.zsh

The script holds all names, so completing is instant. Print it again after an update.
"""

import contextlib
import shlex

from conclugen_jax.commands import app
from conclugen_jax.commands.names import COMMANDS
from conclugen_jax.errors import ConclugenError
from conclugen_jax.runs import configuration_files

command = app.Command(words="bash, zsh or fish", jax=False)

BASH = r"""_conclugen() {
  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" prefix="" words=""
  [[ $current == "=" ]] && current="" && before="="
  if [[ $before == "=" ]]; then  # bash splits --config=NAME into three words
    [[ " ${COMP_WORDS[*]:COMP_CWORD-2:3}" == *" --config "* ]] && words="@CONFIGS@"
  elif [[ $current == --config=* ]]; then  # zsh does not
    prefix="--config=" current="${current#--config=}" words="@CONFIGS@"
  elif [[ $COMP_CWORD == 1 ]]; then
    words="@COMMANDS@"
  elif [[ $current == -* ]]; then
    case "${COMP_WORDS[1]}" in
@CASES@
    esac
  fi
  COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$current"))
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *= ]] && COMPREPLY[0]+=" "
}
complete -o default -o nospace -F _conclugen conclugen"""


def main() -> None:
    """Print the script."""
    zsh = "autoload -U +X bashcompinit && bashcompinit\n"
    writers = {"bash": _bash, "zsh": lambda flags: zsh + _bash(flags), "fish": _fish}
    if len(command.words) != 1 or command.words[0] not in writers:
        raise ConclugenError(f"name one shell: {', '.join(writers)}")
    print(writers[command.words[0]](_flags()))


def _flags() -> dict[str, dict[str, str]]:
    """Return command -> flag -> help; no flags for a command that needs an extra which is not installed."""
    found = {}
    for name in COMMANDS:
        found[name] = {}
        with contextlib.suppress(ModuleNotFoundError):
            found[name] = app.load(name).command.described()
    return found


def _bash(flags: dict[str, dict[str, str]]) -> str:
    cases = [f'      {name}) words="{" ".join(f"--{flag}=" for flag in known)}" ;;' for name, known in flags.items()]
    script = BASH.replace("@COMMANDS@", " ".join(flags)).replace("@CONFIGS@", " ".join(configuration_files.names()))
    return script.replace("@CASES@", "\n".join(cases))


def _fish(flags: dict[str, dict[str, str]]) -> str:
    lines = []
    for name, known in flags.items():
        lines.append(f"complete -c conclugen -n __fish_use_subcommand -f -a {name} -d {shlex.quote(COMMANDS[name])}")
        for flag, text in known.items():
            values = f" -x -a {shlex.quote(' '.join(configuration_files.names()))}" if flag == "config" else " -r"
            seen = f"'__fish_seen_subcommand_from {name}'"
            lines.append(f"complete -c conclugen -n {seen} -l {flag}{values} -d {shlex.quote(text)}")
    return "\n".join(lines)
