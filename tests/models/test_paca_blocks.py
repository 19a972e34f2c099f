import pytest
import torch

from models.clustering import soft_assignment
from models.paca_blocks import ConvClustering, MlpClustering, PaCaAttention
from tests.oracles import paca_attention as oracle


@pytest.mark.parametrize("num_clusters", [5, 0])
def test_patch_to_cluster_attention_equals_the_naive_loop(num_clusters: int) -> None:
    torch.manual_seed(0)
    clustering = ConvClustering(8, num_clusters, kernel_size=3) if num_clusters else None
    eps = 0.1 if num_clusters else None
    attention = PaCaAttention(8, 2, clustering=clustering, cluster_norm_eps=eps).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    parameters = {name: parameter.detach().numpy() for name, parameter in attention.named_parameters()}
    expected_clusters = oracle.soft_assignment(clustering(x, (3, 4)).detach().numpy()) if clustering else None
    expected = oracle.patch_to_cluster_attention(x.numpy(), expected_clusters, parameters, num_heads=2, eps=0.1)
    out, clusters = attention(x, (3, 4), None)
    torch.testing.assert_close(out, torch.from_numpy(expected), atol=1e-12, rtol=1e-12)
    if expected_clusters is None:
        assert clusters is None
    else:
        torch.testing.assert_close(clusters, torch.from_numpy(expected_clusters), atol=1e-14, rtol=1e-12)


def test_an_assignment_of_an_earlier_block_is_used_where_a_block_makes_none() -> None:
    torch.manual_seed(0)
    making = PaCaAttention(8, 2, clustering=MlpClustering(8, 6, hidden_dim=16), cluster_norm_eps=1e-6)
    using = PaCaAttention(8, 2, clustering=None, cluster_norm_eps=1e-6)
    using.load_state_dict({n: w for n, w in making.state_dict().items() if not n.startswith("clustering.")})
    x = torch.randn(2, 12, 8)
    clusters = soft_assignment(making.clustering(x, (3, 4)))
    torch.testing.assert_close(using(x, (3, 4), clusters), making(x, (3, 4), None), atol=0, rtol=0)
