"""The first import of the command line: it blocks signals until ``interrupts.end_at_once`` handles them.

Otherwise a signal in the first hundredths of a second shows a traceback from some import. This applies only if jrlhf
is the program; as a library it leaves signals alone.
"""

import sys

# The import of ``signal`` itself is too slow here.
from _signal import SIG_BLOCK, SIGINT, SIGTERM, pthread_sigmask  # pyright: ignore[reportMissingImports]

IS_PROGRAM = bool(sys.argv) and sys.argv[0].endswith(("/jrlhf", "/jrlhf/__main__.py"))

if IS_PROGRAM:
    pthread_sigmask(SIG_BLOCK, (SIGINT, SIGTERM))
