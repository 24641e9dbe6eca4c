"""Gradients of the embeddings, from the accumulated products: everything O(N·D), all modalities in one launch.

    g_i  = weight·(2^−h·‖z_i‖·Σ_j H_ij y_j − Σ_pairs negative_mass_i·ŷ_i)            InfoNCE, the positive in float32
         + 2·w_atp/(N(M−1))·Σ_partners (ẑ_i − ŷ_i)                                  ATP
         + 1/M·J_c·(2t·w_cu/Z)·(Σ_j e_ij (c_j − c_i))                                CU through the centroid
    dz_i = (g_i − ⟨g_i, ẑ_i⟩ẑ_i)/‖z_i‖

with ŷ_i the matching row of a partner and J_c the derivative of the centroid's normalisation. A program takes blocks of
whole rows of one modality; one more writes the gradient of the logit scale (``.softmax_sums``). Per modality reads
M·N·D·b + 2·4·N·D bytes, writes N·D·b.
"""

import triton
import triton.language as tl
from torch import Tensor

from gapkernels.backends.contract import Evaluation
from gapkernels.backends.triton.device import cdiv, num_processors, row_block
from gapkernels.backends.triton.gradient_tiles import Moment, gradient_scale
from gapkernels.backends.triton.launch import launch, layout
from gapkernels.backends.triton.row_statistics import (
    centred,
    centroid_exponent,
    centroid_rows,
    load_rows,
    padded,
    unit_rows,
)
from gapkernels.backends.triton.softmax_sums import PARTIALS_AT_ONCE, scale_gradient_like, write_scale_gradient


@triton.jit
def through_normalization(gradient, unit, inverse, clamped):
    """Gradient with respect to v, from that with respect to v/max(‖v‖, eps)."""
    along = tl.where(clamped, 0.0, tl.sum(gradient * unit, axis=1))
    return (gradient - along[:, None] * unit) * inverse[:, None]


@triton.jit(
    do_not_specialize=["num_rows", "all_rows", "first_row", "total_rows", "num_moments"],
    do_not_specialize_on_alignment=[
        "negative_mass",
        "centroid_logs",
        "log_total",
        "reference",
        "sums",
        "upstream",
        "logit_scale",
        "uniformity_t",
    ],
)
def row_gradients_kernel(
    embeddings,
    strides,
    factors,
    products,
    centroid_products,
    negative_mass,
    centroid_logs,
    log_total,
    reference,
    sums,
    upstream,
    logit_scale,
    out,
    moments,
    positive_moments,
    scale_gradient,
    num_moments,
    num_rows,
    all_rows,
    first_row,
    total_rows,
    dim,
    padded_dim,
    entry_scale,
    uniformity_t,
    world_size,
    TARGETS: tl.constexpr,
    POSITIVES: tl.constexpr,
    ATP_PARTNERS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    NCE: tl.constexpr,
    CENTROIDS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_CENTROIDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    if scale_gradient is not None:  # noqa: SIM102 (by itself: what is absent is not compiled)
        if (tl.program_id(1) == len(TARGETS)) & (tl.program_id(0) == 0):
            write_scale_gradient(
                moments, positive_moments, upstream, logit_scale, scale_gradient, num_moments, total_rows, NUM_PAIRS,
                AT_ONCE,
            )  # fmt: skip
    for t in tl.static_range(len(TARGETS)):
        if tl.program_id(1) == t:
            one_target(
                embeddings, strides, factors[t], products[t], centroid_products, negative_mass, centroid_logs,
                log_total, reference, sums, upstream, logit_scale, out[t], num_rows, all_rows, first_row, total_rows,
                dim, padded_dim, entry_scale, uniformity_t, world_size, t, TARGETS, POSITIVES, ATP_PARTNERS,
                NUM_PAIRS, NCE, CENTROIDS, NORMALIZE, NORMALIZE_CENTROIDS, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit
def one_target(
    embeddings,
    strides,
    factors,
    products,
    centroid_products,
    negative_mass,
    centroid_logs,
    log_total,
    reference,
    sums,
    upstream,
    logit_scale,
    out,
    num_rows,
    all_rows,
    first_row,
    total_rows,
    dim,
    padded_dim,
    entry_scale,
    uniformity_t,
    world_size,
    PLACE: tl.constexpr,
    TARGETS: tl.constexpr,
    POSITIVES: tl.constexpr,
    ATP_PARTNERS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    NCE: tl.constexpr,
    CENTROIDS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_CENTROIDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of one modality, the one at this place among the targets."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BLOCK_D)
    rows_in_all = total_rows.to(tl.float64)
    weight = (tl.load(upstream) * tl.load(logit_scale).to(tl.float64) / (2 * rows_in_all * max(NUM_PAIRS, 1))).to(
        tl.float32
    )
    atp_weight = (2 * tl.load(upstream + 1) / (rows_in_all * (len(embeddings) - 1))).to(tl.float32)
    if CENTROIDS:
        total = tl.load(log_total)
        stretch = centroid_exponent(sums, len(embeddings), dim, total_rows, BLOCK_D)
        cu_weight = 2 * tl.load(uniformity_t) * tl.load(upstream + 2)
        product_weight = (cu_weight * tl.exp2(tl.load(reference).to(tl.float64) - total - stretch)).to(tl.float32)
    for start in tl.range(program * BLOCK_N, num_rows, programs * BLOCK_N):
        local = start + tl.arange(0, BLOCK_N)  # within the block of rows whose gradient is computed
        exists = local < num_rows
        i = tl.where(exists, local + first_row, all_rows)  # within all rows of this process
        inside = exists[:, None] & (k < dim)[None, :]
        z, inverse, clamped = unit_rows(
            embeddings[TARGETS[PLACE]], strides[TARGETS[PLACE]], i, all_rows, dim, BLOCK_D, NORMALIZE
        )
        gradient = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if NCE:
            factor = tl.load(factors + local, mask=exists, other=1.0)
            product = load_rows(products, padded_dim, local, num_rows, dim, BLOCK_D)
            gradient += product * (weight / entry_scale / factor)[:, None]
            for p in tl.static_range(len(POSITIVES)):
                if POSITIVES[p][0] == PLACE:
                    partner, _, _ = unit_rows(
                        embeddings[POSITIVES[p][2]], strides[POSITIVES[p][2]], i, all_rows, dim, BLOCK_D, NORMALIZE
                    )
                    share = tl.load(negative_mass + POSITIVES[p][1] * all_rows.to(tl.int64) + i, mask=exists, other=0.0)
                    gradient -= (weight * share.to(tl.float32))[:, None] * partner
        for p in tl.static_range(len(ATP_PARTNERS)):
            if ATP_PARTNERS[p][0] == PLACE:
                partner, _, _ = unit_rows(
                    embeddings[ATP_PARTNERS[p][1]], strides[ATP_PARTNERS[p][1]], i, all_rows, dim, BLOCK_D, NORMALIZE
                )
                gradient += atp_weight * (z - partner)
        if CENTROIDS:
            c, mean_inverse, mean_clamped = centroid_rows(
                embeddings, strides, i, all_rows, dim, BLOCK_D, NORMALIZE, NORMALIZE_CENTROIDS
            )
            share = tl.exp2(tl.load(centroid_logs + i, mask=exists, other=0.0) - total)
            own_weight = (cu_weight * share).to(tl.float32)
            through = load_rows(centroid_products, padded_dim, i, all_rows, dim, BLOCK_D)
            through *= product_weight
            through -= own_weight[:, None] * tl.where(
                inside, centred(c, sums, len(embeddings), dim, total_rows, BLOCK_D), 0.0
            )
            if NORMALIZE_CENTROIDS:
                through = through_normalization(through, c, mean_inverse, mean_clamped)
            gradient += through / len(embeddings)
        if NORMALIZE:
            gradient = through_normalization(gradient, z, inverse, clamped)
        pointers = out + local.to(tl.int64)[:, None] * dim + k[None, :]
        tl.store(pointers, (gradient * world_size).to(out.dtype.element_ty), mask=inside)


def row_gradients(
    targets: list[int],
    rows: slice,
    factors: list[Tensor | None],
    products: list[Tensor | None],
    centroid_products: Tensor | None,
    evaluation: Evaluation,
    out: list[Tensor],
    moment: Moment | None,
) -> Tensor | None:
    """See ``gapkernels.backends.contract.Backend.row_gradients``."""
    embeddings, spec, saved = evaluation.embeddings, evaluation.spec, evaluation.saved
    (all_rows, dim), modalities = embeddings[0].shape, len(embeddings)
    num_rows = rows.stop - rows.start
    block_rows, block_dim = row_block(dim, 2048)
    has_products = products[0] is not None
    scale_gradient = None if moment is None else scale_gradient_like(evaluation)
    scalars = evaluation.scalars

    def constants() -> dict[str, object]:
        pairs = spec.nce_pairs(modalities) if has_products else []
        positives, partners = [], []  # place among the targets, pair, partner; place, partner
        for place, t in enumerate(targets):
            positives += [(place, p, k if m == t else m) for p, (m, k) in enumerate(pairs) if t in (m, k)]
            others = [k for k in range(modalities) if k != t] if t == spec.anchor else [spec.anchor]
            partners += [(place, k) for k in others if spec.atp]
        return {
            "TARGETS": tuple(targets),
            "POSITIVES": tuple(positives),
            "ATP_PARTNERS": tuple(partners),
            "NUM_PAIRS": len(pairs),
            "NCE": has_products,
            "CENTROIDS": centroid_products is not None,
            "NORMALIZE": spec.normalize,
            "NORMALIZE_CENTROIDS": spec.normalize_centroids,
            "BLOCK_N": block_rows,
            "BLOCK_D": block_dim,
            "AT_ONCE": PARTIALS_AT_ONCE,
        }

    launch(
        row_gradients_kernel,
        (
            min(cdiv(num_rows, block_rows), 8 * num_processors(embeddings[0].device)),
            len(targets) + (moment is not None),
        ),
        (
            layout(embeddings),
            layout(out),
            tuple(f is None or f.data_ptr() % 16 == 0 for f in factors),
            tuple(targets),
            has_products,
            None if centroid_products is None else centroid_products.dtype,
            scalars.logit_scale.dtype,
            scalars.uniformity_t.dtype,
            evaluation.upstream.dtype,
            None if scale_gradient is None else scale_gradient.dtype,
            dim,
            spec,
        ),
        (
            tuple(embeddings),
            tuple(e.stride(0) for e in embeddings),
            tuple(factors),
            tuple(products),
            centroid_products,
            saved.negative_mass,
            saved.centroid_log_sum,
            saved.centroid_summary,
            evaluation.prepared.centroid_reference,
            saved.sums,
            evaluation.upstream,
            scalars.logit_scale,
            tuple(out),
            None if moment is None else moment.partials,
            evaluation.prepared.positive_moment,
            scale_gradient,
            0 if moment is None else moment.used,
            num_rows,
            all_rows,
            rows.start,
            evaluation.total_rows,
            dim,
            padded(dim),
            gradient_scale(embeddings[0].dtype),
            scalars.uniformity_t,
            float(evaluation.world_size),
        ),
        constants,
    )
    return scale_gradient
