"""The program `enerverse`: small verbs in the order in which data walks.

Each verb is a frozen dataclass with a `run` method in a file of its own; its heavy imports happen inside `run`,
so `enerverse --help` answers at once. `main` turns every failure that a user can cause into one sentence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

try:
    import tyro

    from enerverse.cli.demo import Demo
    from enerverse.cli.failures import INTERRUPTED, exit_code, explain
    from enerverse.cli.imagine import Imagine
    from enerverse.cli.info import Info
    from enerverse.cli.multiview import Multiview
    from enerverse.cli.reconstruct import Reconstruct
    from enerverse.cli.record import Record
    from enerverse.cli.rollout import Rollout
    from enerverse.cli.sparse import Sparse
    from enerverse.cli.train import Train
except KeyboardInterrupt:  # the program has not begun, so that nothing else would turn Ctrl-C into a line
    print("enerverse: stopped; nothing was written", file=sys.stderr)
    sys.exit(130)

VERBS: dict[str, Any] = {
    "record": Record,
    "multiview": Multiview,
    "reconstruct": Reconstruct,
    "train": Train,
    "imagine": Imagine,
    "rollout": Rollout,
    "sparse": Sparse,
    "demo": Demo,
    "info": Info,
}
DESCRIPTION = """Embodied world models: record demonstrations, see them from more cameras, train, imagine, act in MuJoCo.

`enerverse VERB --help` explains a verb. With --traceback (or ENERVERSE_TRACEBACK=1) an error shows where it
happened."""
TRACEBACK = "--traceback"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 2 for a failure explained in one sentence, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    loud = TRACEBACK in words or os.environ.get("ENERVERSE_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != TRACEBACK]
    try:
        parse(words).run()
    except BrokenPipeError:  # the reader has gone (`enerverse info | head`)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        if loud or code is None:
            raise
        print(f"enerverse: {explain(error)}", file=sys.stderr)
        return code
    finally:
        _flush()
    return 0


def parse(words: Sequence[str]) -> Any:
    """The verb that `words` name, with its settings. Raises ValueError naming the closest verb."""
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        from enerverse.config import unknown

        raise unknown("verb", words[0], VERBS)
    return tyro.extras.subcommand_cli_from_dict(
        VERBS,
        args=list(words) or ["--help"],
        prog="enerverse",
        description=DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
    )


def _flush() -> None:
    """Write what is left; a reader that has gone is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["INTERRUPTED", "VERBS", "main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
