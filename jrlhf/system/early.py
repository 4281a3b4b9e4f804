"""What the command line imports first: signals wait until it has what answers them (``interrupts.end_at_once``).

Else one in the first hundredths of a second is a traceback out of some import. Only where jrlhf is the program: a
library leaves signals alone.
"""

import sys

# ``signal`` itself takes longer to import than all that could happen here.
from _signal import SIG_BLOCK, SIGINT, SIGTERM, pthread_sigmask  # pyright: ignore[reportMissingImports]

IS_PROGRAM = bool(sys.argv) and sys.argv[0].endswith(("/jrlhf", "/jrlhf/__main__.py"))

if IS_PROGRAM:
    pthread_sigmask(SIG_BLOCK, (SIGINT, SIGTERM))
