"""An LSTM language model whose gates are linear layers, visible to hooks.

``nn.LSTM`` hides the gradients of its gates in fused kernels. Here a cell is two ``nn.Linear``:
``inputs`` reads all tokens of a sequence at once, ``hidden`` the state, one token after another, so
it is called as often as there are tokens. Each token is a row of the factors of both; that rows of
one sequence depend on each other is neglected, as K-FAC does of the tokens of a transformer
(Martens, Ba and Johnson, "Kronecker-factored curvature approximations for recurrent neural
networks", ICLR 2018, where they are taken for independent too in the simplest variant).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from curvfast.display import ReportStage, silent
from curvfast.experiments.data.corpus import TokenizedCorpus
from curvfast.experiments.models.cache import Output, cached, load_weights, save_weights
from curvfast.experiments.models.language import training_batches
from curvfast.experiments.models.training import fit
from curvfast.experiments.recipes import Recipe, key_of
from curvfast.model.rows import IGNORED_LABEL

State = tuple[Tensor, Tensor]
"""Hidden and cell state of an LSTM cell, each [sequences, hidden]."""


@dataclass(frozen=True)
class LstmRecipe:
    """Sizes, schedule and seed."""

    text: Recipe = field(default_factory=Recipe)
    """Text, passages, steps, batches and seed; sizes and rates of the Llama are not used."""
    embedding: int = 128
    hidden: int = 256
    cells: int = 1
    learning_rate: float = 6e-3
    weight_decay: float = 0.01
    """Smaller than a transformer's; otherwise it memorizes nothing in as many steps."""

    def quick(self) -> LstmRecipe:
        """Return a recipe of seconds, which runs every step but gives no meaningful results."""
        return replace(self, text=self.text.quick(), embedding=16, hidden=24)

    def training_key(self) -> str:
        """Return a name for the trained model: a hash of what its training depends on."""
        return key_of({**asdict(self), "text": self.text.training_key()})


class Cell(nn.Module):
    """A long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000)."""

    def __init__(self, width: int, hidden: int) -> None:
        """Create the cell.

        Args:
            width: Width of its input.
            hidden: Width of its state.
        """
        super().__init__()
        self.inputs = nn.Linear(width, 4 * hidden)
        self.hidden = nn.Linear(hidden, 4 * hidden, bias=False)
        with torch.no_grad():
            # Forget bias 1: gates are in the order of the forward, forget second.
            self.inputs.bias[hidden : 2 * hidden] = 1.0

    def forward(self, x: Tensor, state: State, real: Tensor | None = None) -> tuple[Tensor, State]:
        """Process a sequence.

        Args:
            x: [sequences, tokens, width].
            state: State after the earlier tokens.
            real: [sequences, tokens]; where it is 0 the state is reset. None means 1 everywhere.

        Returns:
            Outputs [sequences, tokens, hidden], and the state after the last token.
        """
        h, c = state
        outputs = []
        for token, own in enumerate(self.inputs(x).unbind(1)):
            enter, forget, value, leave = (own + self.hidden(h)).chunk(4, dim=-1)
            c = forget.sigmoid() * c + enter.sigmoid() * value.tanh()
            h = leave.sigmoid() * c.tanh()
            if real is not None:
                h, c = h * real[:, token, None], c * real[:, token, None]
            outputs.append(h)
        return torch.stack(outputs, dim=1), (h, c)


class LstmLm(nn.Module):
    """An LSTM language model: embedding, cells, a projection, and the tied embedding as head."""

    def __init__(self, *, vocabulary: int, embedding: int, hidden: int, cells: int) -> None:
        """Create the model, with torch's initialisation except for the embedding.

        Args:
            vocabulary: Number of tokens.
            embedding: Width of an embedding.
            hidden: Width of a state.
            cells: Number of stacked cells.
        """
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        widths = [embedding, *(hidden for _ in range(cells - 1))]
        self.cells = nn.ModuleList(Cell(width, hidden) for width in widths)
        self.projection = nn.Linear(hidden, embedding)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[State] | None = None,
        use_cache: bool = False,
    ) -> Output:
        """Predict the next token at each position.

        Args:
            input_ids: [sequences, tokens].
            labels: Tokens to be predicted, each at its own place, [sequences, tokens]; -100 where
                there is none.
            attention_mask: 1 at real tokens, 0 at padding on the left; of all tokens read so far.
            past_key_values: The states that an earlier call returned.
            use_cache: Whether states are returned.

        Returns:
            Logits [sequences, tokens, vocabulary], with labels their mean cross-entropy, and
            states.
        """
        x = self.embedding(input_ids)
        real = None
        if attention_mask is not None and not attention_mask.all():
            real = attention_mask[:, -input_ids.shape[1] :].to(x.dtype)
        states = past_key_values
        if states is None:
            zero = x.new_zeros(len(x), self.cells[0].hidden.in_features)  # type: ignore[union-attr]
            states = [(zero, zero)] * len(self.cells)
        left = []
        for cell, state in zip(self.cells, states, strict=True):
            x, after = cell(x, state, real)
            left.append(after)
        logits = linear(self.projection(x), self.embedding.weight)
        loss = None
        if labels is not None:
            loss = cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
            )
        return Output(logits, loss, tuple(left) if use_cache else None)


def new_lstm(recipe: LstmRecipe) -> LstmLm:
    """Return a freshly initialised model in float32; the global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.text.seed)
        return LstmLm(
            vocabulary=recipe.text.vocabulary, embedding=recipe.embedding, hidden=recipe.hidden,
            cells=recipe.cells,
        )  # fmt: skip


def trained_lstm(
    recipe: LstmRecipe, corpus: TokenizedCorpus, report_stage: ReportStage = silent
) -> LstmLm:
    """Return the recipe's model, trained now or read from the cache of an earlier run."""
    return cached(
        "lab-lstm",
        recipe.training_key(),
        read=lambda folder: load_weights(new_lstm(recipe), folder).eval(),
        make=lambda unfinished: train_lstm(
            recipe, corpus, unfinished=unfinished, report_stage=report_stage
        ),
        write=lambda model, folder: save_weights(model, folder, asdict(recipe)),
    )


def train_lstm(
    recipe: LstmRecipe,
    corpus: TokenizedCorpus,
    *,
    unfinished: Path | None = None,
    report_stage: ReportStage = silent,
) -> LstmLm:
    """Train from scratch on what the demo's Llama learns; one recipe gives one model."""
    model: LstmLm = fit(
        new_lstm(recipe),
        training_batches(recipe.text, corpus),
        steps=recipe.text.steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        unfinished=unfinished,
        report_stage=report_stage,
    )
    return model
