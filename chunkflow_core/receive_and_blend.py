"""Second stage of one block: fetch what its neighbours donated, add it up, write the rest.

python -m chunkflow_core.receive_and_blend SPEC --block Z Y X
"""

import sys

from chunkflow_core.commands import stages

main = stages.blend

if __name__ == "__main__":
    sys.exit(main())
