"""fp8 rows and their products: precision, padding, and the way that a card and its torch have."""

import logging

import pytest
import torch
from pack.kernels import fp8_linear, fp8_matmul, quantise_rows
from pack.kernels.fp8 import aligned, dequantise_rows, fp8_scores, quantise_weight


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (13652, 24), (20, 7208)])
def test_fp8_linear_pads_what_the_matmul_cannot_take(inputs, outputs):
    """The padded fp8 matmuls (torch has them for the CPU too) and the reference, against the same numbers in fp32."""
    random = torch.Generator().manual_seed(inputs)
    x = quantise_rows(torch.randn(2, 5, inputs, generator=random) * torch.tensor([1.0, 300.0])[:, None, None])
    weight = quantise_weight(torch.randn(outputs, inputs, generator=random))
    assert all(size % 16 == 0 for size in weight.values.shape) and not weight.values[outputs:].float().any()
    wanted = dequantise_rows(x, inputs) @ dequantise_rows(weight, inputs)[:outputs].T
    found = [fp8_linear(x, weight, outputs)]
    found += [multiply(x, weight).unflatten(0, (2, 5))[..., :outputs] for multiply in fp8_matmul.WAYS.values()]
    for product in found:
        assert product.shape == (2, 5, outputs) and product.dtype == torch.bfloat16
        assert (product.float() - wanted).norm() < 4e-3 * wanted.norm()  # one rounding to bf16, or three


def test_a_card_takes_its_way(monkeypatch):
    """What follows `is_cuda`, with every way and with none."""
    x, weight = quantise_rows(torch.randn(2, 5, 20)), quantise_weight(torch.randn(24, 20))
    wanted = fp8_linear(x, weight, 24)

    class OnCard:
        """Rows that say that they are on a card."""

        is_cuda = True

        def __init__(self, tensor):
            self.tensor = tensor

        def __getattr__(self, name):
            return getattr(self.tensor, name)

        def __getitem__(self, index):
            return self.tensor[index]

    monkeypatch.setattr(fp8_matmul, "capability_of", lambda device: (8, 9))
    for way in (*fp8_matmul.WAYS, None):
        monkeypatch.setattr(fp8_matmul, "way_of", lambda capability, way=way: way)
        found = fp8_linear(x._replace(values=OnCard(x.values)), weight, 24)
        assert found.shape == (2, 5, 24) and (found - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize(
    ("refuses", "way", "told"),
    [
        (lambda scale: False, "rows", None),
        (lambda scale: scale.numel() > 1, "tensor", "with a scale for the whole tensor (rows: CUBLAS_STATUS"),
        (lambda scale: True, None, "multiplies no fp8 here (rows: CUBLAS_STATUS_NOT_SUPPORTED; tensor: CUBLAS_STATUS"),
    ],
    ids=["RTX 40, H100", "RTX 50", "an older torch"],
)
def test_fp8_is_multiplied_in_the_way_that_this_torch_has_for_the_card(refuses, way, told, monkeypatch, caplog):
    multiply, check = torch._scaled_mm, fp8_matmul.check

    def scaled_mm(*matrices, scale_a, **options):
        if refuses(scale_a):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long trace")
        return multiply(*matrices, scale_a=scale_a, **options)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8_matmul, "check", lambda multiply: check(multiply, "cpu"))
    fp8_matmul.way_of.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [fp8_matmul.way_of(card) for card in ((12, 0), (12, 0), (8, 6))] == [way, way, None]
    fp8_matmul.way_of.cache_clear()
    assert [told in record.message for record in caplog.records] == ([True] if told else [])


def test_a_wrong_product_is_noticed():
    with pytest.raises(RuntimeError, match="its result is off by"):
        fp8_matmul.check(lambda x, weight: 1.1 * fp8_matmul.by_rows(x, weight), "cpu")


def test_quantised_rows_keep_e4m3s_precision_at_every_magnitude():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-8, 1.0, 1e8])[:, None]
    rows = quantise_rows(torch.cat([x, torch.zeros(1, 40)]))
    assert rows.values.shape == (4, 48) and rows.values.float().abs().amax(1).tolist() == [448, 448, 448, 0]
    assert not rows.values[:, 40:].float().any()
    error = dequantise_rows(rows, 40)[:3] - x
    assert (error.abs() <= x.abs() * 2**-4 + x.abs().amax(1, keepdim=True) * 2**-10 / 448).all()
    first, second = rows.split((1, 3), 0)
    assert torch.equal(second.values.float(), rows.values[1:].float()) and torch.equal(first.scale, rows.scale[:1])


def test_scales_of_a_slice_are_brought_to_an_address_that_cublas_takes():
    """It refuses others: the text's rows of a layer of experts begin anywhere."""
    scales = torch.rand(40, 1)
    assert aligned(scales) is scales
    for start in (1, 2, 3):
        moved = aligned(scales[start:])
        assert moved.data_ptr() % 16 == 0 and torch.equal(moved, scales[start:])


def test_the_largest_score_that_queries_and_keys_can_have_is_a_number_of_fp16():
    """Hopper may return it so (attention_pairs_hopper.py): of 128 columns, all as large as the largest one."""
    q, k = fp8_scores(3 * torch.ones(1, 128), -torch.ones(1, 128), torch.tensor(1.0))
    score = q.values.float() @ k.float().T
    assert -torch.finfo(torch.float16).max < score.item() < -40_000  # little of the range is given away
    torch.testing.assert_close(score * q.scale, torch.tensor([[-3.0 * 128]]))
