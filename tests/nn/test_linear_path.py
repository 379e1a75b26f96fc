"""Bags of features: each equals the dense features that it stands for."""

import numpy as np
import torch

from ehrfuse.nn.linear_path import LinearPath, TableBag, ValueBag, VectorBag, WordBag


def dense(bag, x):
    """Features (b, f) of a bag."""
    ids, weights = bag(x)
    out = torch.zeros(len(ids), bag.n_features)
    return out.scatter_add_(1, ids, weights)


def test_words_are_scaled_and_padding_is_nothing():
    x = {
        "ids": torch.tensor([[2, 0, 1], [1, 1, 1]]).int(),
        "weights": torch.tensor([[0.5, 1.0, 2.0], [3.0, 9.0, 9.0]]),
        "ids_mask": torch.tensor([[True, True, True], [True, False, False]]),
    }
    expected = torch.tensor([[1.0, 20.0, 50.0], [0.0, 30.0, 0.0]])
    torch.testing.assert_close(dense(WordBag(torch.tensor([1.0, 10.0, 100.0])), x), expected)


def test_values_of_one_analyte_are_averaged_and_presence_is_told():
    x = {
        "code": torch.tensor([[1, 1, 0, 2]]),
        "value": torch.tensor([[1.0, 3.0, float("nan"), 7.0]]),
        "code_mask": torch.tensor([[True, True, True, False]]),
    }
    expected = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(dense(ValueBag(3), x), expected)


def test_vectors_are_standardised_and_chunks_averaged():
    bag = VectorBag(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(
        dense(bag, {"values": torch.tensor([[3.0, 100.0]])}), torch.tensor([[1.0, 4.0]])
    )
    chunks = torch.tensor([[[3.0, 1.0], [5.0, 3.0], [99.0, 99.0]]])
    mask = torch.tensor([[True, True, False]])
    found = dense(bag, {"chunks": chunks, "chunks_mask": mask})
    torch.testing.assert_close(found, torch.tensor([[1.5, 2.0]]))


def test_tables_have_values_flags_and_categories():
    x = {
        "values": torch.tensor([[0.5, float("nan")]]),
        "codes": torch.tensor([[2, 0]]).int(),
    }
    expected = torch.tensor([[0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(dense(TableBag(2, [3, 2]), x), expected)
    only = dense(TableBag(0, [3, 2]), {"codes": x["codes"]})
    torch.testing.assert_close(only, expected[:, 4:])


def test_path_is_the_product_and_an_absent_modality_adds_nothing():
    torch.manual_seed(0)
    bags = {"a": VectorBag(torch.zeros(3), torch.ones(3)), "b": TableBag(2, [])}
    path = LinearPath(bags, torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(path.bias, torch.tensor([0.5, -1.0]))
    path.weight.normal_()
    path.gain.copy_(torch.tensor([1.0, 2.0]))
    a, b = torch.rand(4, 3), torch.rand(4, 2)
    b[1] = float("nan")
    inputs = {"a": {"values": a}, "b": {"values": b}}
    present = {"a": torch.tensor([True, True, False, True]), "b": torch.ones(4, dtype=bool)}
    table = np.hstack([a * present["a"][:, None], 2 * b.nan_to_num(), 2.0 * ~b.isnan()])
    exact = torch.from_numpy(table).float() @ path.weight + path.bias
    torch.testing.assert_close(path(inputs, present), exact)
