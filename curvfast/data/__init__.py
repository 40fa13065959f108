"""Text batches for measuring curvature: files or datasets streamed lazily as batches of tokens."""

from curvfast.data.batches import TokenBatches as TokenBatches
from curvfast.data.batches import text_batches as text_batches
from curvfast.data.corpus import Corpus as Corpus
from curvfast.data.corpus import files as files
from curvfast.data.corpus import rows as rows
