"""Text for measuring curvature: from files or datasets to batches of tokens, lazily and exactly."""

from curvfast.data.batches import TokenBatches as TokenBatches
from curvfast.data.batches import text_batches as text_batches
from curvfast.data.corpus import Corpus as Corpus
from curvfast.data.corpus import files as files
from curvfast.data.corpus import rows as rows
