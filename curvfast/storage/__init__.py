"""Folders of tensors on disk: versioned, written atomically, in one file or one a part.

``config.json``, or another index where that is taken, names every tensor file with its size,
SHA-256 and keys, and is replaced last: a folder is either the old state or the new one, whenever
the writer is killed. A folder holds:

* ``config.json``: {"kind", "format_version", "curvfast_version", "files": [{"file", "bytes",
  "sha256", "keys"}], "meta_sha256", ...meta}
* ``tensors-<first 16 digits of the hash>.safetensors``, one or more
"""

from curvfast.storage.format import FORMAT_VERSION as FORMAT_VERSION
from curvfast.storage.format import checksum as checksum
from curvfast.storage.format import raw_bytes as raw_bytes
from curvfast.storage.hf_checkpoint import TensorPlace as TensorPlace
from curvfast.storage.hf_checkpoint import copied as copied
from curvfast.storage.hf_checkpoint import tensor_places as tensor_places
from curvfast.storage.jsonl import append_line as append_line
from curvfast.storage.jsonl import finished_lines as finished_lines
from curvfast.storage.jsonl import record_of as record_of
from curvfast.storage.reading import StoredTensors as StoredTensors
from curvfast.storage.reading import open_folder as open_folder
from curvfast.storage.reading import read_folder as read_folder
from curvfast.storage.writing import FolderWriter as FolderWriter
from curvfast.storage.writing import write_folder as write_folder
from curvfast.storage.writing import write_json as write_json
from curvfast.storage.writing import write_tensors as write_tensors
from curvfast.storage.writing import write_text as write_text
