"""How do the ranks of a job leave each other messages on a store that anybody in the network can reach?"""

import hashlib
import hmac

import torch.distributed

SIGNATURE_BYTES = 2 * hashlib.sha256().digest_size  # in hexadecimal digits


class SignedStore:
    """Texts by name in a TCPStore, signed with a secret of the job. What nobody of the job has written is not there.

    Raises RuntimeError when the store does not answer in time, DistNetworkError when it is gone.
    """

    def __init__(self, store: torch.distributed.TCPStore, secret: bytes) -> None:
        self._store, self._secret = store, secret

    def set(self, name: str, text: str) -> None:
        self._store.set(name, self._signature(name, text.encode()) + text)

    def get(self, name: str) -> str | None:
        """The text of that name; None if there is none, or one that was not signed with the secret for this name."""
        if not self._store.check([name]):
            return None
        message = self._store.get(name)
        signature, content = message[:SIGNATURE_BYTES], message[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(name, content).encode()):
            return None
        return content.decode()

    def _signature(self, name: str, content: bytes) -> str:
        # No name holds a zero byte, so that a name and a content can be told apart.
        return hmac.digest(self._secret, name.encode() + b"\0" + content, "sha256").hex()
