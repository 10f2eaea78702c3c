"""Weight formats for tests of kernels: random weights in each, and quantised activations, all in NumPy."""

import gguf
import numpy as np

MANY = 8  # tokens, from which on superblocks are summed otherwise

# Where a block's F16 factors lie, of the formats that are decoded when they are loaded; the others say it themselves.
DECODED_HALVES = dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,))


def halves(fmt):
    """The bytes of a block at which its F16 factors begin."""
    made_of = getattr(fmt, "made_of", None)
    return DECODED_HALVES.get(fmt.name, ()) if made_of is None else made_of.HALVES


def lengths(fmt):
    """Row lengths: for blocks an odd and an even number of groups of 32, for floats with and without a tail."""
    return [fmt.block_size, 3 * fmt.block_size, 8 * fmt.block_size] if fmt.block_size > 1 else [1, 15, 16, 17, 64, 172]


def random_bytes(fmt, rng, n_out, n_in):
    """Rows of random blocks [n_out, bytes] whose factors are moderate numbers."""
    raw = rng.integers(0, 256, (n_out, n_in // fmt.block_size, fmt.type_size), dtype=np.uint8)
    for at in halves(fmt):
        numbers = 0.02 * rng.standard_normal(raw.shape[:2])
        raw[..., at : at + 2] = numbers.astype(np.float16).view(np.uint8).reshape(*raw.shape[:2], 2)
    if fmt.name == "IQ1_M":  # the upper four bits of its F16 factor: no more than 0.02
        raw[..., 55] = raw[..., 55] & 0x0F | 0x20
    return raw.reshape(n_out, -1)


def random_weights(fmt, rng, n_out, n_in):
    """Bytes of random weights, and the weights as gguf reads them, in float64."""
    kind = gguf.GGMLQuantizationType(fmt.type)
    weights = rng.standard_normal((n_out, n_in)).astype(np.float32)
    if fmt.name == "F32":
        raw = weights.view(np.uint8)
    elif fmt.name == "F16":
        raw = weights.astype(np.float16).view(np.uint8)
    else:
        try:
            raw = gguf.quantize(weights, kind)
        except NotImplementedError:
            raw = random_bytes(fmt, rng, n_out, n_in)
    raw = raw.reshape(n_out, -1)
    typed = raw.view({"F32": np.float32, "F16": np.float16}.get(fmt.name, np.uint8))
    return raw.reshape(-1), gguf.dequantize(typed, kind).reshape(n_out, n_in).astype(np.float64)


def to_bf16(x):
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return np.where(np.isnan(x), np.float32(np.nan), rounded.astype(np.uint32).view(np.float32))


def to_f16(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def quantise(x):
    """Q8_0 and Q8_1 of activations: quants [n_tok, groups, 32], scales d and sums s [n_tok, groups], float32."""
    groups = x.reshape(len(x), -1, 32)
    amax = np.abs(groups).max(-1)
    d = amax / np.float32(127)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax != 0)
    quants = np.rint(groups * inverse[..., None])
    return quants, to_f16(d), to_f16(d * quants.sum(-1).astype(np.float32))


def quantise_k(x):
    """Q8_K of activations: quants [n_tok, superblocks, 256], scales d float32 [n_tok, superblocks]."""
    groups = x.reshape(len(x), -1, 256)
    furthest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.float32(-127) / furthest
        d = np.where(furthest == 0, np.float32(0), np.float32(1) / inverse)[..., 0]
        quants = np.rint(groups * np.where(np.isfinite(inverse), inverse, np.float32(0)))
    return quants, d


def as_activation(x, name):
    """The activations that a dot product sees, in float64."""
    if name in ("Q8_0", "Q8_1", "Q8_K"):
        quants, d = quantise_k(x) if name == "Q8_K" else quantise(x)[:2]
        return (quants.astype(np.float64) * d[..., None]).reshape(x.shape)
    return {"F32": lambda x: x, "F16": to_f16, "BF16": to_bf16}[name](x).astype(np.float64)
