"""`python -m tests.fuzz NAME --seconds N` looks for bytes that break a target's rules.

Starts from the target's corpus. Bytes that reach more of the code are written to the folder
`--into`; bytes that break a rule are left in the present folder as `crash-...`: mend what is wrong,
then keep them in the corpus, as short as they can be made (`--shorten FILE`, before it is mended).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import CORPUS, TARGETS, Check, check_of

try:
    import atheris
except ImportError:
    atheris = None

_NO_ATHERIS = (
    "atheris is not in this environment. For Linux there are wheels of it: "
    "python -m pip install atheris"
)
_BYTES_MAX = 4_096


def main(arguments: Sequence[str]) -> int:
    """Run one target until its time is over, or a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("name", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="how long (60)")
    parser.add_argument("--into", type=Path, help="a folder for what is found (forgotten)")
    parser.add_argument("--shorten", type=Path, metavar="FILE", help="bytes that break a rule")
    options = parser.parse_args(arguments)
    if options.shorten:
        options.shorten.write_bytes(shortened(check_of(options.name), options.shorten.read_bytes()))
        return 0
    if atheris is None:
        print(_NO_ATHERIS, file=sys.stderr)
        return 2
    seeds = ",".join(map(str, sorted((CORPUS / options.name).iterdir())))
    given = [
        f"-max_len={_BYTES_MAX}",
        f"-max_total_time={options.seconds}",
        f"-seed_inputs={seeds}",
    ]
    if options.into:
        options.into.mkdir(parents=True, exist_ok=True)
        given.append(str(options.into))
    with atheris.instrument_imports(include=["anser"]):
        check = check_of(options.name)
    atheris.Setup([sys.argv[0], *given], check)
    atheris.Fuzz()  # ends the process
    return 0


def shortened(check: Check, data: bytes) -> bytes:
    """These bytes without all that can be left out while they still break a rule."""
    size = len(data)
    while size:
        at = 0
        while at < len(data):
            less = data[:at] + data[at + size :]
            if _breaks(check, less):
                data = less
            else:
                at += size
        size //= 2
    return data


def _breaks(check: Check, data: bytes) -> bool:
    try:
        check(data)
    except Exception:  # noqa: BLE001 - whatever it is, it should not have been raised
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
