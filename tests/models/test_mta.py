from dataclasses import replace

import torch

from models.mta import Mta, read_parents
from models.tcformer import TCFormer
from models.token_blocks import Tokens
from models.token_exchange import link_tokens
from tests.models.picture_laws import pictures
from tests.models.small_tcformers import SMALL, SMALL_NECK


def test_further_maps_leave_rows_and_columns_out() -> None:
    neck = Mta(SMALL.dims, replace(SMALL_NECK, num_outputs=5)).eval()
    maps = neck(TCFormer(SMALL).eval()(pictures(64, 64)))
    assert [fmap.shape[2:] for fmap in maps] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    torch.testing.assert_close(maps[3], maps[2][:, :, ::2, ::2], atol=0, rtol=0)


def test_a_token_reads_what_stands_at_the_one_that_it_was_merged_into() -> None:
    links = link_tokens(None, num_tokens=4, cell_grid=(2, 2), grid=(2, 2))
    clusters = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    coarse = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    read = read_parents(coarse, Tokens(coarse, links, None, clusters))
    assert read.squeeze(-1).tolist() == [[2, 1, 2, 2], [3, 3, 4, 3]]
