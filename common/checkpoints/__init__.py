"""Reading and writing checkpoints, in one place because it is a security boundary.

save_checkpoint, load_checkpoint   own files: atomic, checksummed, tensors and plain values only
read_foreign, record_state_dict    files of third parties, any format of PyTorch: nothing in them is executed
python -m common.checkpoints FILE  what is in a checkpoint
"""

from common.checkpoints.errors import CheckpointError
from common.checkpoints.foreign import read_foreign
from common.checkpoints.own import load_checkpoint, previous_path, save_checkpoint
from common.checkpoints.records import Record, RecordClass, record_state_dict

__all__ = [
    "CheckpointError",
    "Record",
    "RecordClass",
    "load_checkpoint",
    "previous_path",
    "read_foreign",
    "record_state_dict",
    "save_checkpoint",
]
