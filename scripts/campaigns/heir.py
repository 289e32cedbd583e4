"""The command line, of a process that takes a lock over after a moment of silence, not after 20 s."""

from streamconv.__main__ import main
from streamconv.storage import lease

if __name__ == "__main__":
    lease.EXPIRE_SECONDS = 0.5
    main()
