# Copyright 2026 The dp_curriculum authors. Licensed under the Apache License, Version 2.0.
"""
Secret randomness: the noise and the Poisson masks that the privacy guarantee stands on.

Every draw is keyed from the operating system when it is made, and the key is forgotten when the call returns. So there
is no seed to pass, no state to save, replay or leak, and nothing that a forked process could share with its parent.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Protocol, get_args

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20


Mode = Literal["secure", "fast"]

_NUM_DRAWS = 4
_CHUNK = 32768
_MASK_CHUNK = 2**18
_KEY_BYTES = 32
_BYTES_PER_KEY = 2**37  # half of what the 32-bit block counter of ChaCha20 (RFC 8439) can number


class _Keystream(Protocol):
    def update_into(self, data: Any, buf: Any) -> int: ...


def draw_key(num_bytes: int) -> bytes:
    """A secret key from the operating system. It is no noise and no mask of a mechanism: a run may keep it."""
    return os.urandom(num_bytes)


class SecretGenerator:
    r"""
    Draws DP noise and Poisson masks from operating-system entropy.

    It takes no seed, and cannot be pickled, copied or saved.

    Args:
        mode (`"secure"` or `"fast"`, *optional*, defaults to `"secure"`): `"secure"` turns a ChaCha20 keystream with a
            fresh 256-bit key into normals on the CPU. `"fast"` uses the device's own generator with a fresh key for
            each call: a 64-bit seed of torch's Philox on CUDA; 384 bits of key and counter of NumPy's Philox on the
            CPU, because torch's CPU engine keeps only 32 bits of its seed, and 2^32 seeds can be tried one by one.
            Neither Philox is a cryptographic generator. Masks are ChaCha20 in both modes.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where noise is returned.

    Privacy:
        Each normal is the sum of four float64 normals, halved (Holohan and Braghin 2021, arXiv 2107.10138): the gaps
        between floating-point values of one draw, which can give the noise away (Mironov 2012), are then out of reach
        of a search. Add noise to a sum in float64 (`dtype=torch.float64`) and round once, after that: noise that was
        rounded first lies on a grid of float32, and what the released value is off that grid reveals the sum. What is
        left of the rounding is what the guarantee calls idealised arithmetic.

    Example:
    ```py
    >>> from dp_curriculum.privacy.randomness import SecretGenerator

    >>> generator = SecretGenerator()
    >>> generator.gaussian((2, 3), std=0.5).shape
    torch.Size([2, 3])
    ```
    """

    def __init__(self, mode: Mode = "secure", *, device: str | torch.device = "cpu") -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"Expected mode={mode!r} in {get_args(Mode)}: choose one of them.")
        self._mode: Mode = mode
        self._device = torch.device(device)
        if mode == "fast" and self._device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"Expected device={str(device)!r} to be CPU or CUDA in fast mode: use mode='secure' there."
            )

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def is_private(self) -> bool:
        """True if the draws are secret. A run whose generator says `False` must be marked not private."""
        return True

    def gaussian(self, shape: int | Sequence[int], std: float, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        r"""
        Draws independent N(0, std^2).

        Args:
            shape (`int` or `Sequence[int]`): Shape of the draw.
            std (`float`): Standard deviation; 0 gives zeros.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): `torch.float64` for noise that is added to
                a private sum, see above.

        Returns:
            `torch.Tensor`: Of `dtype`, rounded once from float64, on `device`.

        Raises:
            ValueError: If `std` is negative or not finite, or `shape` has a negative entry.

        Shapes:
            `shape`, or `(shape,)` for an integer.
        """
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"Expected std={std} to be finite and at least 0: it scales the noise.")
        if any(size < 0 for size in sizes):
            raise ValueError(f"Expected shape={sizes} without negative entries.")
        count = math.prod(sizes)
        if self._mode == "fast" and self._device.type == "cuda":
            draws = self._device_normals(count)
        elif self._mode == "fast":
            draws = torch.from_numpy(self._philox_normals(count))
        else:
            draws = torch.from_numpy(self._chacha_normals(count))
        return draws.mul_(std).to(dtype).to(self._device).reshape(sizes)

    def poisson_sample(self, num_rows: int, sample_rate: float) -> torch.Tensor:
        r"""
        Draws a Poisson sample: each row enters independently, with probability `sample_rate`.

        A row enters when its 64-bit word is below `floor(sample_rate * 2^64)`, an integer comparison. The probability
        is exactly `sample_rate` from 2^-12 up, and at most 2^-64 under it (never above) for smaller rates.

        Args:
            num_rows (`int`): Rows to draw from. Private: neither logged nor kept.
            sample_rate (`float`): Probability in `[0, 1]`; 1 returns every row.

        Returns:
            `torch.LongTensor`: Row indices in ascending order, on the CPU; empty draws are draws.

        Raises:
            ValueError: If `sample_rate` is outside `[0, 1]`.

        Shapes:
            `(num_drawn,)`, random.
        """
        if not 0 <= sample_rate <= 1:
            raise ValueError(f"Expected sample_rate={sample_rate} in [0, 1]: it is a probability.")
        if sample_rate == 1:
            return torch.arange(num_rows)
        threshold = np.uint64(int(math.ldexp(sample_rate, 64)))
        drawn = [np.empty(0, dtype=np.int64)]
        stream = self._open_keystream()
        for start in range(0, num_rows, _MASK_CHUNK):
            words = _read_words(stream, min(_MASK_CHUNK, num_rows - start))
            drawn.append(np.flatnonzero(words < threshold) + start)
        return torch.from_numpy(np.concatenate(drawn).astype(np.int64))

    def random_words(self, count: int) -> torch.Tensor:
        """Uniform 64-bit words `(count,)` as `torch.int64`, from ChaCha20 in both modes: an order to take rows in."""
        return torch.from_numpy(_read_words(self._open_keystream(), count).view(np.int64))

    def describe(self) -> dict[str, Any]:
        """Facts on the source of randomness, for the privacy report."""
        philox = "torch-philox" if self._device.type == "cuda" else "numpy-philox"
        return {
            "generator": "chacha20" if self._mode == "secure" else philox,
            "mask_generator": "chacha20",
            "seed_source": "os-entropy",
            "mode": self._mode,
            "secure_rng": self._mode == "secure",
            "floating_point_defence": f"sum of {_NUM_DRAWS} float64 draws",
            "secret": self.is_private,
        }

    def _fresh_key(self, num_bytes: int) -> bytes:
        """Key material of one call. The only source of randomness in this class."""
        return os.urandom(num_bytes)

    def _open_keystream(self) -> _Keystream:
        return _open_chacha20(self._fresh_key(_KEY_BYTES))

    def _chacha_normals(self, count: int) -> np.ndarray:
        out = np.empty(count)
        per_key = _BYTES_PER_KEY // (8 * _NUM_DRAWS)
        for start in range(0, count, per_key):
            _fill_normals(out[start : start + per_key], self._open_keystream())
        return out

    def _philox_normals(self, count: int) -> np.ndarray:
        key, counter = self._fresh_key(16), self._fresh_key(32)
        words = {"key": np.frombuffer(key, "<u8"), "counter": np.frombuffer(counter, "<u8")}
        source = np.random.Generator(np.random.Philox(**words))
        out = source.standard_normal(count)
        for _ in range(_NUM_DRAWS - 1):
            out += source.standard_normal(count)
        return np.multiply(out, _NUM_DRAWS**-0.5, out=out)

    def _device_normals(self, count: int) -> torch.Tensor:
        source = torch.Generator(self._device).manual_seed(int.from_bytes(self._fresh_key(8), "little", signed=True))
        draws = torch.randn(_NUM_DRAWS, count, dtype=torch.float64, device=self._device, generator=source)
        return draws.sum(0).mul_(_NUM_DRAWS**-0.5)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self._mode!r}, device={str(self._device)!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"Refusing to copy a {type(self).__name__}: it stays in its process. Make another one.")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(None)

    def __copy__(self) -> NoReturn:
        self.__reduce_ex__(None)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce_ex__(None)


def _open_chacha20(key: bytes, nonce: bytes = bytes(16)) -> _Keystream:
    """The keystream of RFC 8439. `nonce` is its block counter, then its nonce: all zero, for each key is used once."""
    return Cipher(ChaCha20(key, nonce), mode=None).encryptor()


def _read_words(stream: _Keystream, count: int) -> np.ndarray:
    """The next `count` 64-bit words of the keystream."""
    plain = np.zeros(count, dtype="<u8")
    words = np.empty_like(plain)
    stream.update_into(plain.data.cast("B"), words.data.cast("B"))
    return words


def _fill_normals(out: np.ndarray, stream: _Keystream) -> None:
    """Fills `out` with standard normals: sums of four Box-Muller draws (Box and Muller 1958), halved."""
    pairs = min(_CHUNK, (len(out) + 1) // 2)
    total, trig, radius = np.empty((2, pairs)), np.empty(pairs), np.empty(pairs)
    for start in range(0, len(out), 2 * pairs):
        total[:] = 0
        for _ in range(_NUM_DRAWS):
            words = _read_words(stream, 2 * pairs)
            words >>= np.uint64(11)
            # In (0, 1], so that the logarithm is finite; 2^-53 puts the largest draw at 8.57.
            np.multiply(words[:pairs] + np.uint64(1), 2.0**-53, out=radius)
            np.sqrt(np.multiply(np.log(radius, out=radius), -2.0, out=radius), out=radius)
            angle = torch.from_numpy(words[pairs:] * (2.0**-53 * 2 * math.pi))
            for row, function in zip(total, (torch.cos, torch.sin)):
                function(angle, out=torch.from_numpy(trig))
                row += np.multiply(trig, radius, out=trig)
        flat = np.multiply(total, _NUM_DRAWS**-0.5).ravel()
        out[start : start + 2 * pairs] = flat[: len(out) - start]
