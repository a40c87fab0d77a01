"""Commands in child processes whose files may not become larger than a limit, as on a full disk."""

import os
import resource
import sys
import traceback
from pathlib import Path

from deltadiff.__main__ import main


def run_with_limit(argv: list[str], limit: int, log: Path) -> tuple[int, list[str]]:
    """(exit code, lines on stderr) of a command whose files have at most ``limit`` bytes."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
            os.environ["TQDM_DISABLE"] = "1"
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, log.read_text(errors="replace").splitlines()
