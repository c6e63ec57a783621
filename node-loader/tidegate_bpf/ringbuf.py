"""Reading a BPF ring buffer through its memory map, without a callback per record.

The kernel's layout: one page with the consumer's position (ours to write), one with the
producer's, then the data, mapped twice in a row so that no record is ever split.
"""

from __future__ import annotations

import mmap
import threading

from tidegate_bpf.maps import Map

_HEADER = 8
_BUSY = 1 << 31
_DISCARD = 1 << 30
_LENGTH = _DISCARD - 1


class RingBuffer:
    """The one consumer of a RINGBUF map. Does not own the map. A context manager; close once."""

    def __init__(self, ring: Map) -> None:
        self._fd = ring.fileno()
        self._size = ring.info.max_entries
        page = mmap.PAGESIZE
        self._consumer_page = mmap.mmap(self._fd, page, mmap.MAP_SHARED)
        try:
            self._ring = mmap.mmap(
                self._fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except OSError:
            self._consumer_page.close()
            raise
        # Native views move eight bytes in one access; struct's "=Q" would move them one by one.
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer = memoryview(self._ring)[:page].cast("Q")
        self._data = memoryview(self._ring)[page:]
        self._words = self._data.cast("I")
        self._barrier = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        """The map's descriptor, readable (poll, epoll) when a record was committed."""
        return self._fd

    @property
    def consumed(self) -> int:
        """Bytes that have been read of all there ever were, by whichever consumer."""
        return self._consumer[0]

    def read(self, limit: int = 65536) -> list[bytes]:
        """At most `limit` committed records, oldest first; their room is given back."""
        records: list[bytes] = []
        at = self._consumer[0]
        end = self._producer[0]
        self._order()
        mask = self._size - 1
        while at < end and len(records) < limit:
            offset = at & mask
            header = self._words[offset >> 2]
            if header & _BUSY:
                break
            length = header & _LENGTH
            if not header & _DISCARD:
                self._order()
                start = offset + _HEADER
                records.append(bytes(self._data[start : start + length]))
            at += (_HEADER + length + 7) & ~7
        self._order()
        self._consumer[0] = at
        return records

    def read_fixed(self, size: int) -> bytes:
        """The committed records that come next, as long as each has `size` bytes: one after the
        other, oldest first, each behind eight bytes of the kernel's. Their room is given back. Of
        a ring whose records are all of one size; ValueError: the next one is not."""
        at, end = self._consumer[0], self._producer[0]
        self._order()
        step = (_HEADER + size + 7) & ~7
        start = at & (self._size - 1)
        span = end - at
        headers = self._words[start >> 2 : (start + span) >> 2 : step >> 2].tolist()
        whole = len(headers)
        if headers.count(size) != whole:
            whole = next(i for i, header in enumerate(headers) if header != size)
            if not whole and not headers[0] & _BUSY:
                raise ValueError(f"a record of {headers[0] & _LENGTH} bytes, not {size}")
        if not whole:
            return b""
        self._order()
        data = bytes(self._data[start : start + whole * step])
        self._order()
        self._consumer[0] = at + whole * step
        if step == size + _HEADER:
            return data
        return b"".join(data[i : i + size + _HEADER] for i in range(0, len(data), step))

    def _order(self) -> None:
        """Keep loads and stores before this from moving behind it. x86 needs nothing; elsewhere
        taking and releasing a lock is the acquire and release that Python can express."""
        with self._barrier:
            pass

    def close(self) -> None:
        """Unmap; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for view in (self._consumer, self._producer, self._words, self._data):
            view.release()
        self._consumer_page.close()
        self._ring.close()

    def __enter__(self) -> RingBuffer:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
