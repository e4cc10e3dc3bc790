"""How large is an Image Transformer, and what does it compute for one image?"""

from torch import nn

from models.image_transformer.network import Network
from models.image_transformer.shape import ImageTransformerShape
from models.model import Account, Flops, Recompute, num_parameters

PARTS = ("embedding", "encoder", "attention projections", "attention scores", "feed-forward", "head")
"""Of the model, in the order of the forward pass; scores are the products of queries, keys and values."""


def account_of(network: Network, recompute: Recompute) -> Account:
    """Exact: attention counts the pairs that each layer's patterns let see each other, and nothing else. The network's
    weights are not looked at.

    What fused kernels compute again inside (scores in the backward pass) is not counted.
    """
    shape = network.config
    length, encoder_length = network.length, 3 * shape.small_size**2
    products = {  # forward, by the module's name
        name: 2 * module.in_features * module.out_features * _rows(name, shape)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }
    scores = [  # of each layer of the decoder, whose heads take its patterns in turn
        4
        * (shape.attention_width // len(patterns))
        * sum(pattern.num_pairs + length * encoder_length for pattern in patterns)
        for patterns in network.patterns
    ]
    forward = dict.fromkeys(PARTS, 0)
    for name, flops in products.items():
        forward[_part_of(name)] += flops
    forward["attention scores"] = sum(scores)
    forward["encoder"] += shape.encoder_layers * 4 * shape.attention_width * encoder_length**2

    recomputed = dict.fromkeys(PARTS, 0)
    for index in range(shape.layers):
        if recompute.includes(index):
            # The keys and values of the encoder are computed for all layers at once, outside of them.
            for name, flops in products.items():
                if name.startswith(f"layers.{index}.") and not _reads_encoder(name):
                    recomputed[_part_of(name)] += flops
            recomputed["attention scores"] += 0 if recompute.keeps_attention else scores[index]
            if shape.norm == "pre" and shape.dropout == 0:
                # Nothing after the layer's last product needs its result, so torch stops before it.
                recomputed["feed-forward"] -= products[f"layers.{index}.feed_forward.out"]
    # Where intensities are combined linearly, they need no gradient.
    stem = ("embed_input.values", "embed_input.values.combine", "embed_input.values.combine_own")
    needless = {"embedding": stem, "head": ("predictors.combine", "channels.combine_own")}
    first = {part: sum(products.get(name, 0) for name in names) for part, names in needless.items()}
    parts = {
        part: Flops(
            forward=forward[part],
            backward=2 * forward[part] - first.get(part, 0),
            recomputed=recomputed[part],
        )
        for part in PARTS
        if forward[part]
    }
    positions = len(network.generation_order)
    return Account(parameters=num_parameters(network), positions=positions, parts=parts, attention="attention scores")


def _rows(module: str, shape: ImageTransformerShape) -> int:
    """How many rows the matrix product of the module of this name has."""
    if _reads_encoder(module):
        return 3 * shape.small_size**2
    is_of_pixels = module in ("embed_input.values.combine", "predictors.combine")
    if shape.input == "ordinal":
        is_of_pixels = not (shape.draws_by_channel and module.startswith(("channels.", "head")))
    return (1 if is_of_pixels else 3) * shape.image_size**2


def _part_of(module: str) -> str:
    """The part of `PARTS` that a matrix product belongs to, by its module's name."""
    if module.startswith("encoder."):
        return "encoder"
    if module.startswith("embed"):
        return "embedding"
    if module.startswith("layers."):
        return "feed-forward" if ".feed_forward." in module else "attention projections"
    return "head"


def _reads_encoder(name: str) -> bool:
    """Whether the module of this name is applied to the tokens of the small image."""
    return name.startswith("encoder.") or name.endswith(".encoder_attention.kv")
