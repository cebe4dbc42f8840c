"""First stage of one block: run its patches, write what is final, donate what others need.

python -m chunkflow_core.inference_and_donate SPEC --block Z Y X
"""

import sys

from chunkflow_core.commands import stages

main = stages.infer

if __name__ == "__main__":
    sys.exit(main())
