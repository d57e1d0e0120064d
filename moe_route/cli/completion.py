"""`moe-route completion`: completion of commands, options and their choices for bash, zsh and fish.

The shell code calls ``moe-route completion SHELL --words WORD...`` at each key press, so completions always match the
installed version. If that prints nothing, the shell completes file names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.options import Parser, command

SCRIPTS = {
    "bash": r"""_moe_route() {
    local IFS=$'\n'
    COMPREPLY=($(moe-route completion bash --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _moe_route moe-route""",
    "zsh": r"""#compdef moe-route
_moe_route() {
    local -a found
    found=(${(f)"$(moe-route completion zsh --words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -- $found; else _files; fi
}
compdef _moe_route moe-route""",
    "fish": r"""function __moe_route_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found (moe-route completion fish --words $words[2..] "$current" 2>/dev/null)
    if test -n "$found"
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c moe-route -f -a '(__moe_route_complete)'""",
}


def add_completion(verbs: Any) -> None:
    parser = command(
        verbs,
        "completion",
        run,
        "print the code that completes commands in a shell",
        'eval "$(moe-route completion bash)"       # in ~/.bashrc; zsh the same in ~/.zshrc, after compinit\n'
        "moe-route completion fish > ~/.config/fish/completions/moe-route.fish",
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell to complete in")
    parser.takes_any_word = True
    parser.add_argument("--words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> Answer:
    if options.words is not None:
        from moe_route.cli import parser

        words = candidates(parser(), options.words)
        return Answer({"candidates": words}, "\n".join(words))
    script = SCRIPTS[options.shell]
    return Answer({"shell": options.shell, "script": script}, script)


def candidates(parser: Parser, words: Sequence[str]) -> list[str]:
    """Completions of the last of ``words``, which follow the program's name; the last word may be empty.

    There are none if a value without fixed choices is expected, such as a file.
    """
    *before, current = words or [""]
    positionals = [action for action in parser._actions if not action.option_strings]
    awaiting: argparse.Action | None = None  # the option whose value is expected next
    for index, word in enumerate(before):
        if awaiting is not None and not word.startswith("-"):
            awaiting = awaiting if awaiting.nargs in ("+", "*") else None
        elif word.startswith("-"):
            option = parser._option_string_actions.get(word)
            awaiting = option if option is not None and option.nargs != 0 else None
        elif positionals:
            if isinstance(positionals[0], argparse._SubParsersAction):
                chosen = positionals[0].choices.get(word)
                return candidates(chosen, words[index + 1 :]) if chosen else []
            if positionals[0].nargs not in ("+", "*"):
                positionals.pop(0)
    if awaiting is not None and not current.startswith("-"):
        known = list(awaiting.choices or ())
    elif current.startswith("-"):
        known = [name for name in parser.options if name.startswith("--")]
    else:
        known = list(positionals[0].choices or ()) if positionals else []
    return [str(name) for name in known if str(name).startswith(current)]
