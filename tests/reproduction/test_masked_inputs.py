"""The masked autoencoder: what it sees, what it is judged by, and the probe."""

import pytest
import torch

from reproduction.beyond.masked_inputs.run import MaskedAutoencoder, in_patches, masked_loss, probe_accuracy


@pytest.fixture
def network() -> MaskedAutoencoder:
    return MaskedAutoencoder(places=9, pixels=4, width=8, heads=2, layers=2, decoder_layers=1)


def test_patches_tile_the_image_in_reading_order() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6)
    patches = in_patches(image, 2)
    assert patches.shape == (1, 9, 4)
    assert patches[0, 1].tolist() == [2, 3, 8, 9]
    assert patches[0, 3].tolist() == [12, 13, 18, 19]


def test_hidden_patches_are_not_seen(network: MaskedAutoencoder) -> None:
    patches, kept = torch.randn(2, 9, 4), torch.tensor([[0, 4, 7], [8, 1, 2]])
    changed = patches + 100
    changed.scatter_(1, kept.unsqueeze(-1).expand(-1, -1, 4), patches.take_along_dim(kept.unsqueeze(-1), 1))
    torch.testing.assert_close(network(patches, kept), network(changed, kept))
    changed[0, 4] += 1
    assert not torch.allclose(network(patches, kept)[0], network(changed, kept)[0])


def test_features_stay_at_their_places(network: MaskedAutoencoder) -> None:
    """The order in which kept patches are named changes nothing of the drawing."""
    patches, kept = torch.randn(2, 9, 4), torch.tensor([[0, 4, 7], [8, 1, 2]])
    turned = kept[:, [2, 0, 1]]
    torch.testing.assert_close(network.encode(patches, kept)[:, [2, 0, 1]], network.encode(patches, turned))
    torch.testing.assert_close(network(patches, kept), network(patches, turned))


@pytest.mark.parametrize(("ratio", "judged"), [(0.0, 9), (1 / 3, 3), (0.9, 8)])
def test_only_hidden_patches_are_judged(
    ratio: float, judged: int, network: MaskedAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is off by 1 at the kept patches and by 2 at the hidden ones."""
    seen = []

    def off(patches: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        seen.append(kept)
        drawn = patches + 2
        drawn.scatter_(1, kept.unsqueeze(-1).expand(-1, -1, 4), patches.take_along_dim(kept.unsqueeze(-1), 1) + 1)
        return drawn

    monkeypatch.setattr(network, "forward", off)
    loss = masked_loss(network, torch.randn(50, 9, 4), ratio)
    assert loss.item() == pytest.approx(4 if ratio else 1, rel=1e-5)
    assert seen[0].shape == (50, 9 - (judged if ratio else 0))
    # every image its own mask
    assert len({tuple(sorted(row.tolist())) for row in seen[0]}) > 1 or not ratio


def test_the_probe_finds_linear_classes_and_nothing_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    X, T = (torch.randn(n, 5, generator=generator) * torch.tensor([100.0, 1, 1, 1, 0.01]) for n in (600, 400))
    direction = torch.randn(5, 3, generator=generator) / torch.tensor([100.0, 1, 1, 1, 0.01]).unsqueeze(1)
    y, z = (X @ direction).argmax(1), (T @ direction).argmax(1)
    assert probe_accuracy(X, y, T, z) > 0.95
    shuffled = y[torch.randperm(600, generator=generator)]
    assert probe_accuracy(X, shuffled, T, z) < 0.5
