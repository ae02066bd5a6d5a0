"""Completion in bash, which takes ``--layout cfg=2,u`` for three words."""

from __future__ import annotations

import os

from click.shell_completion import BashComplete, CompletionItem, add_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_OMNI_PARALLEL_COMPLETE"
"""By which the script in the shell asks for completions; click makes it of the command's name."""


class _Bash(BashComplete):
    """Puts words together that bash cut at ``=``, and completes what follows the last one."""

    def get_completion_args(self) -> tuple[list[str], str]:
        words = os.environ["COMP_WORDS"].split()
        at = int(os.environ["COMP_CWORD"])
        words = words[: at + 1] if at < len(words) else [*words, ""]
        joined: list[str] = []
        for word in words[1:]:
            # Options keep theirs: click itself takes --layout, = and the value.
            cut = joined and (word == "=" or joined[-1].endswith("="))
            if cut and not joined[-1].startswith("-") and joined[-1] != "=":
                joined[-1] += word
            else:
                joined.append(word)
        return joined[:-1], joined[-1] if joined else ""

    def format_completion(self, item: CompletionItem) -> str:
        words = os.environ["COMP_WORDS"].split()
        at = int(os.environ["COMP_CWORD"])
        cut = any(word == "=" for word in words[max(0, at - 1) : at + 1])
        value = str(item.value)
        if cut and "=" in value:
            _, typed = self.get_completion_args()
            item.value = value[typed.rfind("=") + 1 :]
        return super().format_completion(item)


def register() -> None:
    """Have click complete in bash as here."""
    add_completion_class(_Bash)
