"""Solvers against plain float64 transcriptions of their formulas, and against each other."""

import pytest
import torch

from sparseprune.pruning import METHODS, Method, Pattern, Target
from sparseprune.pruning.methods import find_method
from sparseprune.pruning.methods.admm import admm_solve, gradual_mask
from sparseprune.pruning.methods.gram import cached, checked, damped, inverse_factor
from sparseprune.pruning.methods.least_squares import least_squares_update
from sparseprune.pruning.methods.sparsegpt import sparsegpt_solve
from sparseprune.pruning.methods.swaps import swap_refine
from sparseprune.pruning.patterns import mask_from_scores
from sparseprune.statistics.inputs import Gram

PATTERNS = [
    ("unstructured", 0.5),
    ("unstructured", 0.83),
    ("2:4", 0.5),
    ("4:8", 0.5),
    ("3:5", 0.4),
    ("4x2", 0.5),
]


def target_of(pattern, sparsity=0.5, scope="row"):
    return Target(Pattern.parse(pattern), sparsity, scope)


def gram_of(inputs):
    gram = Gram(inputs.shape[1], torch.device("cpu"))
    gram.update(inputs)
    return gram


def layer(rows=24, columns=40, tokens=400, seed=0):
    """A weight, and inputs that share hidden causes and have channels a hundredfold apart, heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, columns // 4, generator=generator)
    inputs = causes @ torch.randn(columns // 4, columns, generator=generator)
    inputs += 0.5 * torch.randn(tokens, columns, generator=generator)
    inputs *= torch.exp(torch.randn(columns, generator=generator))
    inputs *= torch.exp(0.5 * torch.randn(tokens, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator), inputs


def error(weight, pruned, matrix):
    """||X (W - P)^T||^2 as a share of ||X W^T||^2."""
    difference, matrix = (weight - pruned).double(), matrix.double()
    weight = weight.double()
    return (((difference @ matrix) * difference).sum() / ((weight @ matrix) * weight).sum()).item()


def damped_reference(matrix, damping):
    matrix = matrix.double()
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def least_squares_reference(weight, mask, matrix):
    """Each row's normal equations on its own support, solved on their own."""
    solved = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        wanted = matrix @ weight[row].double()
        solved[row, kept] = torch.linalg.solve(matrix[kept][:, kept], wanted[kept])
    return solved


def check_counts(pruned, target):
    rows, columns = pruned.weight.shape
    mask, pattern = pruned.mask, target.pattern
    assert pruned.weight.dtype == torch.float32
    assert pruned.weight.isfinite().all()
    assert (pruned.weight[~mask] == 0).all()
    if pattern.structured:
        assert (mask.reshape(rows, -1, pattern.m).sum(2) == pattern.n).all()
        return
    height, width = pattern.block
    blocks = mask.reshape(rows // height, height, columns // width, width)
    units = blocks[:, 0, :, 0]
    assert (blocks == units[:, None, :, None]).all()
    if target.scope == "row":
        assert ((~units).sum(1) == round(units.shape[1] * target.sparsity)).all()
    assert (~units).sum() == sum(
        round(slice_.numel() * target.sparsity) for slice_ in (units if target.scope == "row" else [units])
    )


class TestGram:
    def test_inverse_factor_is_that_of_the_inverse(self):
        gram = gram_of(layer()[1])
        factor = inverse_factor(gram)
        assert torch.equal(factor, factor.triu())
        inverse = torch.linalg.inv(damped_reference(gram.matrix, 0.01))
        expected = torch.linalg.cholesky(inverse, upper=True)
        assert torch.allclose(factor.double(), expected, rtol=1e-5, atol=1e-7 * expected.max())

    def test_shared_until_more_tokens_come(self):
        inputs = layer()[1]
        gram = gram_of(inputs)
        first = inverse_factor(gram)
        assert inverse_factor(gram) is first
        gram.update(3 * inputs)
        assert torch.allclose(inverse_factor(gram), first / 10**0.5, rtol=1e-3, atol=1e-6)
        assert cached(gram, "a", lambda: 1) == 1
        gram.matrix.zero_()
        assert cached(gram, "a", lambda: 2) == 2

    def test_ladder(self):
        # indefinite by 5 % of its mean diagonal: 1 % is not enough, 10 % is
        matrix = torch.diag(torch.tensor([1.0, 2.0, -0.05, 1.05]))
        with pytest.warns(RuntimeWarning, match="not positive definite with 1% damping; went on with 10%"):
            result = damped(matrix, 0.01)
        assert result.damping == pytest.approx(0.1)
        assert torch.allclose(result.factor @ result.factor.t(), result.matrix)
        assert damped(matrix.abs(), 0.01).damping == 0.01
        with pytest.raises(ValueError, match=r"must be a Gram matrix X\^T X, .* with 1000% damping"):
            damped(-torch.eye(3), 0.01)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["sparsegpt", "admm", "wanda+swaps", "magnitude+least-squares"])
    def test_not_finite(self, name, bad):
        weight, inputs = layer()
        gram = gram_of(inputs)
        gram.matrix[2, 3] = bad
        with pytest.raises(ValueError, match="statistic: the Gram matrix must be finite, got NaN or Inf"):
            find_method(name).prune(weight, gram, target_of("2:4"))
        with pytest.raises(ValueError, match="must be finite"):
            checked(gram)


def sparsegpt_reference(weight, matrix, target):
    """One column after the other: masks as the paper has them, then the optimal update of all later columns
    from the inverse over those columns alone.
    """
    hessian = damped_reference(matrix, 0.01)
    weight = weight.double().clone()
    rows, columns = weight.shape
    pattern = target.pattern
    unit = pattern.m or pattern.block[1]
    width = 128 // unit * unit
    costs = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        scores = weight.square() / costs
        if pattern.structured and j % unit == 0:
            mask[:, j : j + unit] = mask_from_scores(scores[:, j : j + unit], pattern)
        if not pattern.structured and j % width == 0:
            end = min(j + width, columns)
            mask[:, j:end] = mask_from_scores(scores[:, j:end], pattern, target.sparsity, scope=target.scope)
        inverse = torch.linalg.inv(hessian[j:, j:])
        gone = torch.where(mask[:, j], 0, weight[:, j])
        weight[:, j:] -= gone[:, None] / inverse[0, 0] * inverse[0]
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0)
    return weight, mask


class TestSparseGPT:
    @pytest.mark.parametrize("scope", ["row", "layer"])
    @pytest.mark.parametrize(
        ("pattern", "sparsity", "columns"),
        [
            ("unstructured", 0.5, 160),
            ("2:4", 0.5, 160),
            ("3:5", 0.4, 135),
            ("20:50", 0.6, 200),
            ("4x2", 0.5, 160),
        ],
    )
    def test_equals_column_by_column(self, pattern, sparsity, columns, scope):
        weight, inputs = layer(12, columns)
        gram = gram_of(inputs)
        target = target_of(pattern, sparsity, scope)
        expected, mask = sparsegpt_reference(weight, gram.matrix, target)
        pruned = sparsegpt_solve(weight, gram, target)
        assert torch.equal(pruned.mask, mask)
        assert torch.allclose(pruned.weight.double(), expected, atol=2e-4)

    def test_updates_are_used(self):
        weight, inputs = layer()
        gram = gram_of(inputs)
        pruned = sparsegpt_solve(weight, gram, target_of("2:4"))
        assert error(weight, pruned.weight, gram.matrix) < 0.6 * error(
            weight, weight * pruned.mask, gram.matrix
        )


def admm_reference(weight, matrix, target):
    """The formulas word for word, in float64, with everything inverted."""
    matrix, dense = matrix.double(), weight.double()
    n = matrix.diagonal().sqrt()
    eye = torch.eye(len(matrix), dtype=torch.float64)
    g = matrix / n / n[:, None] + 0.1 * eye
    w0 = dense * n
    k = torch.linalg.inv(g + eye)
    w, u = w0, torch.zeros_like(w0)
    for t in range(20):
        if t < 15:
            m = gradual_mask((w + u).square(), target, 1 - (1 - (t + 1) / 15) ** 3)
        z = (w + u) * m
        u = u + w - z
        w = (w0 @ g + z - u) @ k
    return z / n, m


class TestAdmm:
    @pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
    @pytest.mark.parametrize("scope", ["row", "layer"])
    def test_equals_the_formulas(self, pattern, sparsity, scope):
        weight, inputs = layer()
        gram = gram_of(inputs)
        target = target_of(pattern, sparsity, scope)
        expected, mask = admm_reference(weight, gram.matrix, target)
        pruned = admm_solve(weight, gram, target)
        assert (pruned.mask != mask).sum() <= 4  # near-ties of float32
        rows = (pruned.mask == mask).all(1)
        assert torch.allclose(pruned.weight[rows].double(), expected[rows], atol=1e-3)

    @pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
    def test_gradual_mask_grows_into_the_target(self, pattern, sparsity):
        scores = torch.rand(8, 40)
        target = target_of(pattern, sparsity)
        final = target.mask(scores)
        before = torch.ones_like(final)
        for share in (0.2, 0.5, 0.8, 1.0):
            mask = gradual_mask(scores, target, share)
            assert not (mask & ~before).any()
            assert (~mask).float().mean().item() == pytest.approx(share * sparsity, abs=0.06)
            before = mask
        assert torch.equal(before, final)


class TestLeastSquares:
    @pytest.mark.parametrize("damping", [0.01, 0.1])
    def test_equals_normal_equations(self, damping):
        weight, inputs = layer()
        gram = gram_of(inputs)
        mask = torch.rand(weight.shape) < 0.5
        mask[0], mask[1] = True, False
        matrix = gram.matrix.double()
        expected = least_squares_reference(weight, mask, matrix + damping * torch.diag(matrix.diagonal()))
        solved = least_squares_update(weight, mask, gram, damping, iterations=200, tolerance=1e-6)
        assert torch.allclose(solved.double(), expected, atol=1e-3)
        assert torch.equal(solved[0], weight[0]), "nothing removed, nothing to make up for"
        assert (solved[~mask] == 0).all()

    def test_default_precision_loses_nothing_that_counts(self):
        weight, inputs = layer(16, 200)
        gram = gram_of(inputs)
        mask = mask_from_scores(weight.abs(), "2:4")
        hessian = gram.matrix.double() + 0.1 * torch.diag(gram.matrix.diagonal().double())
        best = error(weight, least_squares_reference(weight, mask, hessian), hessian)
        found = error(weight, least_squares_update(weight, mask, gram), hessian)
        assert best <= found * (1 + 1e-6)
        assert found < 1.001 * best

    def test_against_lstsq(self):
        weight, inputs = layer(4, 12, tokens=300)
        gram = gram_of(inputs)
        mask = mask_from_scores(weight.abs(), "2:4")
        solved = least_squares_update(weight, mask, gram, damping=1e-9, iterations=500, tolerance=1e-9)
        for row, kept in enumerate(mask):
            wanted = inputs.double() @ weight[row].double()
            expected = torch.linalg.lstsq(inputs.double()[:, kept], wanted).solution
            assert torch.allclose(solved[row, kept].double(), expected, atol=1e-3)


def best_exchange(weight, mask, matrix, m):
    """By trying all: the change of a row's error under its best exchange, and the exchange."""
    best = (0.0, None)
    lost = torch.where(mask, 0, weight)
    before = lost @ matrix @ lost
    for u in mask.nonzero().flatten().tolist():
        for p in (~mask).nonzero().flatten().tolist():
            if m and u // m != p // m:
                continue
            changed = lost.clone()
            changed[u], changed[p] = weight[u], 0
            best = min(best, ((changed @ matrix @ changed - before).item(), (u, p)))
    return best


class TestSwaps:
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:5", "1:4"])
    def test_ends_where_no_exchange_helps(self, pattern):
        weight, inputs = layer(6, 20)
        gram = gram_of(inputs)
        matrix = gram.matrix.double()
        target = target_of(pattern, None if pattern != "unstructured" else 0.5)
        start = mask_from_scores(weight.abs(), pattern, target.sparsity)
        refined = swap_refine(weight, start, gram, target, passes=100, gain=1e-6)
        moved = 0
        for row in range(len(weight)):
            lost = torch.where(refined[row], 0, weight[row]).double()
            change, _ = best_exchange(weight[row].double(), refined[row], matrix, target.pattern.m)
            assert -change <= 1e-5 * (lost @ matrix @ lost)
            moved += (refined[row] != start[row]).any().item()
        assert moved == len(weight)
        assert torch.equal(refined.sum(1), start.sum(1))
        if target.pattern.m:
            assert (refined.reshape(6, -1, target.pattern.m).sum(2) == target.pattern.n).all()

    def test_a_single_exchange_is_the_best_one(self):
        # the mask of the best support but for one exchange, which brute force finds
        weight, inputs = layer(8, 8, seed=3)
        gram = gram_of(inputs)
        matrix = gram.matrix.double()
        target = target_of("unstructured", 0.5)
        optimum = swap_refine(weight, mask_from_scores(weight.abs(), "unstructured", 0.5), gram, target)
        for row in range(8):
            start = optimum[row].clone()
            kept, removed = start.nonzero()[0], (~start).nonzero()[0]
            start[kept], start[removed] = False, True
            change, (u, p) = best_exchange(weight[row].double(), start, matrix, 0)
            assert change < 0
            found = swap_refine(weight[row : row + 1], start[None], gram, target)
            expected = start.clone()
            expected[u], expected[p] = False, True
            lost_found = torch.where(found[0], 0, weight[row]).double()
            lost_expected = torch.where(expected, 0, weight[row]).double()
            assert lost_found @ matrix @ lost_found <= (lost_expected @ matrix @ lost_expected) * (1 + 1e-6)

    @pytest.mark.parametrize("name", ["magnitude+swaps", "wanda+swaps"])
    def test_no_row_gets_worse_and_most_get_better(self, name):
        weight, inputs = layer(32, 120)
        gram = gram_of(inputs)
        for pattern in ("unstructured", "2:4"):
            target = target_of(pattern)
            before = find_method(name.split("+")[0]).prune(weight, gram, target)
            after = find_method(name).prune(weight, gram, target)
            for row in range(32):
                assert error(
                    weight[row : row + 1], after.weight[row : row + 1], gram.matrix
                ) <= 1.0001 * error(weight[row : row + 1], before.weight[row : row + 1], gram.matrix)
            ratio = error(weight, after.weight, gram.matrix) / error(weight, before.weight, gram.matrix)
            assert ratio < 0.6

    def test_blocks_are_refused(self):
        weight, inputs = layer()
        with pytest.raises(ValueError, match="refine: swaps exchange single weights, got pattern 4x1"):
            find_method("magnitude+swaps").prune(weight, gram_of(inputs), target_of("4x1"))


SOLVERS = ["sparsegpt", "admm", "wanda+least-squares", "wanda+swaps", "wanda+swaps+least-squares"]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scope", ["row", "layer"])
class TestEverySolver:
    @pytest.mark.parametrize(
        ("pattern", "sparsity"), [*PATTERNS, ("unstructured", 0.0), ("unstructured", 0.995)]
    )
    @pytest.mark.parametrize("rows", [4, 24])
    def test_counts_are_exact_and_nothing_given_changes(self, name, pattern, sparsity, scope, rows):
        weight, inputs = layer(rows)
        gram = gram_of(inputs)
        before, matrix = weight.clone(), gram.matrix.clone()
        target = target_of(pattern, sparsity, scope)
        if "swaps" in name and pattern == "4x2":
            with pytest.raises(ValueError, match="refine: swaps exchange single weights"):
                find_method(name).prune(weight, gram, target)
        else:
            check_counts(find_method(name).prune(weight, gram, target), target)
        assert torch.equal(weight, before)
        assert torch.equal(gram.matrix, matrix)

    @pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
    def test_dead_channels(self, name, pattern, scope):
        weight, inputs = layer()
        inputs[:, [0, 1, 2, 17]] = 0
        gram = gram_of(inputs)
        target = target_of(pattern, scope=scope)
        pruned = find_method(name).prune(weight, gram, target)
        check_counts(pruned, target)
        if (
            "swaps" not in name
        ):  # these may find that two live weights make up for each other when both are gone
            assert (~pruned.mask[:, 17]).all(), "a weight that moves nothing goes before all others"
        kept = pruned.mask[:, [0, 1, 2]]
        assert torch.allclose(pruned.weight[:, [0, 1, 2]][kept], weight[:, [0, 1, 2]][kept], rtol=1e-5)

    @pytest.mark.parametrize("tokens", [0, 1, 7])
    def test_singular_gram(self, name, tokens, scope):
        weight, inputs = layer()
        gram = gram_of(inputs[:tokens])
        for pattern in ("unstructured", "2:4"):
            target = target_of(pattern, scope=scope)
            pruned = find_method(name).prune(weight, gram, target)
            check_counts(pruned, target)
            assert pruned.weight.abs().max() < 50 * weight.abs().max()

    @pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
    def test_one_row_and_one_column(self, name, pattern, scope):
        weight, inputs = layer(1, 40)
        target = target_of(pattern, scope=scope)
        check_counts(find_method(name).prune(weight, gram_of(inputs), target), target)
        target = target_of("unstructured", 0.5, scope)
        check_counts(find_method(name).prune(weight[:, :4], gram_of(inputs[:, :4]), target), target)
        check_counts(find_method(name).prune(weight[:, :1], gram_of(inputs[:, :1]), target), target)

    def test_scale_of_the_inputs_does_not_matter(self, name, scope):
        weight, inputs = layer()
        target = target_of("2:4", scope=scope)
        expected = find_method(name).prune(weight, gram_of(inputs), target)
        for scale in (1e-6, 1e6):
            pruned = find_method(name).prune(weight, gram_of(inputs * scale), target)
            assert (pruned.mask != expected.mask).float().mean() < 0.01
            assert pruned.weight.isfinite().all()


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("8x1", 0.5)],
)
def test_order_of_the_methods(pattern, sparsity):
    """On correlated inputs: magnitude, then Wanda, SparseGPT, ADMM, each clearly better, on other inputs too."""
    weight, inputs = layer(64, 160, tokens=4000)
    gram, others = gram_of(inputs[:2000]), gram_of(inputs[2000:])
    errors = {}
    for name in ("magnitude", "wanda", "sparsegpt", "admm", "wanda+least-squares", "admm+least-squares"):
        method = find_method(name)
        pruned = method.prune(weight, gram, target_of(pattern, sparsity, method.scope))
        errors[name] = error(weight, pruned.weight, others.matrix)
    assert errors["wanda"] < 0.6 * errors["magnitude"]
    assert errors["sparsegpt"] < 0.75 * errors["wanda"]
    assert errors["admm"] < 0.75 * errors["sparsegpt"]
    assert errors["admm"] < errors["wanda+least-squares"]
    assert errors["admm+least-squares"] < 1.05 * errors["admm"]


class TestFindMethod:
    def test_suffixes_compose(self):
        method = find_method("wanda+swaps+least-squares")
        assert method.name == "wanda+swaps+least-squares"
        assert method.score is METHODS["wanda"].score
        assert method.refine is swap_refine
        assert method.update is least_squares_update
        assert method.statistic is Gram
        assert method.changes_weights
        assert not find_method("magnitude+swaps").changes_weights
        assert find_method("admm") is METHODS["admm"]
        own = Method("own", lambda weight, statistic: weight)
        assert find_method(own) is own

    def test_update_after_a_solver_starts_from_the_dense_weights(self):
        weight, inputs = layer()
        gram, target = gram_of(inputs), target_of("2:4")
        mask = admm_solve(weight, gram, target).mask
        both = find_method("admm+least-squares").prune(weight, gram, target)
        assert torch.equal(both.mask, mask)
        assert torch.equal(both.weight, least_squares_update(weight, mask, gram))

    @pytest.mark.parametrize("name", ["magic", "", "+swaps", "magic+swaps", None, 3])
    def test_no_such_method(self, name):
        with pytest.raises(
            ValueError, match="method: must be one of admm, .*sparsegpt, .*permute.*swaps.*least-squares"
        ):
            find_method(name)

    @pytest.mark.parametrize("name", ["wanda+", "wanda+magic", "wanda+swaps+swaps"])
    def test_no_such_suffix(self, name):
        with pytest.raises(
            ValueError, match="method: what follows wanda must be among .permute, .swaps, .least-squares"
        ):
            find_method(name)
