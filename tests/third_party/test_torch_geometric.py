"""Graph networks of torch_geometric on its own batches, which are cut graph by graph."""

import pytest

pytest.importorskip("torch_geometric", exc_type=(ImportError, RuntimeError))

import lightning as L
import torch
from beside_plain import run_both
from torch import nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE, global_mean_pool, to_hetero

from harmony_lightning import EmulatedCluster
from harmony_lightning.testing import compare_with_one_device

pytestmark = pytest.mark.third_party


def graphs(num=16):
    generator = torch.Generator().manual_seed(0)
    return [
        Data(
            x=torch.randn(6 + i % 5, 32, generator=generator),
            edge_index=torch.randint(6 + i % 5, (2, 18), generator=generator),
            y=torch.randint(3, (1,), generator=generator),
        )
        for i in range(num)
    ]


class Classifier(L.LightningModule):
    def __init__(self, kind, **options):
        super().__init__()
        self.encoder = kind(32, 64, 5, 64, **options)
        self.head = nn.Linear(64, 3)

    def forward(self, batch):
        return self.head(global_mean_pool(self.encoder(batch.x, batch.edge_index), batch.batch))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch), batch.y)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("validated", nn.functional.cross_entropy(self(batch), batch.y), batch_size=batch.num_graphs)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class OnBatches(Classifier):
    """Hands whole batches to its layers."""

    class Encoder(nn.Module):
        def __init__(self, kind, *sizes):
            super().__init__()
            self.net = kind(*sizes)

        def forward(self, batch):
            return self.net(batch.x, batch.edge_index)

    def __init__(self, kind):
        super().__init__(kind)
        self.encoder = nn.ModuleList(self.Encoder(kind, 32, 64, 2, 64) for _ in range(4))

    def forward(self, batch):
        return self.head(global_mean_pool(sum(encoder(batch) for encoder in self.encoder), batch.batch))


KINDS = {
    "GCN": lambda: Classifier(GCN),
    "GraphSAGE": lambda: Classifier(GraphSAGE, aggr="max", dropout=0.2),
    "GIN": lambda: Classifier(GIN, norm="batch"),
    "GAT": lambda: Classifier(GAT, heads=4, v2=True),
    "layers on batches": lambda: OnBatches(GCN),
}


@pytest.mark.parametrize("name", KINDS)
def test_graph_networks(name):
    memory = 2 * sum(parameter.nbytes for parameter in KINDS[name]().parameters())
    data = DataLoader(graphs(), batch_size=8)
    runs = run_both(KINDS[name], data, memory=memory, room=4 * memory, validate=data, predict=data)
    assert runs.differences == {}
    cut = compare_with_one_device(KINDS[name], list(data), 2, cluster=EmulatedCluster(2, 5 * memory), memory=memory)
    assert cut.actual.statistics.num_microbatches == 4
    assert cut.is_equal, cut


def heterogeneous(i):
    generator = torch.Generator().manual_seed(i)
    data = HeteroData()
    data["author"].x, data["paper"].x = (torch.randn(n, 32, generator=generator) for n in (20, 30))
    data["author"].y = torch.randint(3, (20,), generator=generator)
    edges = torch.stack([torch.randint(20, (60,), generator=generator), torch.randint(30, (60,), generator=generator)])
    data["author", "wrote", "paper"].edge_index, data["paper", "by", "author"].edge_index = edges, edges.flip(0)
    return data


class OnKinds(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = to_hetero(GraphSAGE(32, 64, 4, 64), heterogeneous(0).metadata())
        self.head = nn.Linear(64, 3)

    def training_step(self, batch, batch_idx):
        result = self.head(self.net(batch.x_dict, batch.edge_index_dict)["author"])
        return nn.functional.cross_entropy(result, batch["author"].y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_heterogeneous_graphs():
    data = DataLoader([heterogeneous(i) for i in range(4)], batch_size=2)
    assert run_both(OnKinds, data, memory=400_000, room=800_000).differences == {}
    cut = compare_with_one_device(OnKinds, list(data), 1, cluster=EmulatedCluster(2, 1_200_000), memory=400_000)
    assert cut.actual.statistics.num_microbatches == 2
    assert cut.is_equal, cut
