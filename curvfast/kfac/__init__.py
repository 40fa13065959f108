r"""K-FAC: Kronecker factors, their eigenbasis, and the edit of a weight by what curvature keeps.

One page of background, in the notation of arXiv 2510.24256. Everything below is per linear layer.

**Canonical layout.** A layer is y = a Wᵀ + b with W [d_out, d_in]. Whatever shape a module gives
its activations, they are read as rows: a [rows, d_in] and g [rows, d_out], row t of both belonging
to one application of W. g is the gradient with respect to y of the loss *summed* over labels. The
bias has no column in A: it is neither measured nor edited.

===========================  ==========================  ==========================================
layer                        what the module sees        rows
===========================  ==========================  ==========================================
``nn.Linear``                x [B, T, d_in]              B·T, one a position
``transformers.Conv1D``      x [B, T, d_in]              B·T; its weight is stored as Wᵀ
patch embedding (a           x [B, C, H, W]              B·(H/p)·(W/p), one a patch of C·p·p values
``Conv2d`` of stride p)
expert of a mixture          x [B·T, d_in], routed       the tokens routed to it, one W an expert
``nn.Linear`` in a           x [B, d_in] at each step    one a call and sequence
recurrent cell
===========================  ==========================  ==========================================

**What counts.** A row counts if its position is real and can reach a label, and is left out of a
and g alike if not:

- not a pad;
- in a causal stream of tokens not after the last label of its sequence, or of its document where
  several are packed into one; where labels are not seen, not the last real position;
- in a decoder without a mask not after its last label that is not ignored;
- positions before that count although they have no label: those that follow attend to them;
- in a stream that is not causal (an encoder's, patches, one row a sequence) every real position.

A row that is left out has a gradient of exactly zero, and so the gradients themselves can prove the
rule. How it is known, and in which unit g is, is *proven* by them, *told* by the caller, or a
*convention*, the usual reading of a mask or a name; every result carries it
(:attr:`Factors.known`), and sums of different rules are not added up
(:mod:`~curvfast.kfac.known`, :mod:`~curvfast.kfac.evidence`).

**Factors.** A = E[a aᵀ] [d_in, d_in] and G = E[g gᵀ] [d_out, d_out] are uncentred second moments
over the rows that count: float32 sums and integer counts, divided once when read. A has the unit of
an activation squared, G that of (loss / activation) squared. With labels drawn from the model's own
prediction they factor the Fisher information of W, with the data's labels the empirical Fisher:
F ≈ G ⊗ A for vec(W) taken row by row (Martens and Grosse, arXiv 1503.05671).

**Eigenbasis.** G = U_G diag(λ) U_Gᵀ and A = U_A diag(μ) U_Aᵀ, eigenvalues descending, in float64.
In this basis the weight is C = U_Gᵀ W U_A, and pair (i, j) has the curvature λᵢμⱼ. EK-FAC (George
et al., arXiv 1806.03884) measures that diagonal instead: Λᵢⱼ = E[(uᵢᵀg)² (vⱼᵀa)²].

**Selection.** Pairs are kept in descending λᵢμⱼ until their sum reaches ρ of the whole mass,
(Σλ)(Σμ); the pair that crosses ρ is kept. Both lists are sorted, so the kept set is a *staircase*
(a Young diagram): row i keeps its first width[i] columns, and widths never increase::

    i \ j   0  1  2  3  4       widths
      0     █  █  █  █  ·         4
      1     █  █  ·  ·  ·         2
      2     █  ·  ·  ·  ·         1
      3     ·  ·  ·  ·  ·         0

d_out integers describe it; no mask [d_out, d_in] is formed. Scores that are no product of two lists
(Λᵢⱼ, or a score times Cᵢⱼ²) have an arbitrary mask, held as bits.

**Edit.** W' = U_G (M ∘ C) U_Aᵀ, M being the mask of what is kept. What is *removed* is the low
population curvature, where verbatim memorization lies: a memorized text is sharp in a direction of
its own, which averaged over data is flat; what many texts share stays curved.

From rows to weights: :mod:`~curvfast.kfac.factors`, :mod:`~curvfast.kfac.eigh`,
:mod:`~curvfast.kfac.eigenbasis`, :mod:`~curvfast.kfac.selection`, :mod:`~curvfast.kfac.projection`.
"""
