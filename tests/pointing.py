"""What tests of pages need: to wait for a page, to count it, to put it away."""
import contextlib
import threading
import time

from ascend_nb.ui.bilingual import put_away as shut


def settle(page, seconds=60):
    "Wait until the page does nothing any more."
    def busy(): return page.bar.layout.display != "none" or any("(work)" in t.name for t in threading.enumerate())
    end, quiet = time.monotonic() + seconds, 0
    while quiet < 2:
        assert time.monotonic() < end, "the page is still at work"
        quiet = 0 if busy() else quiet + 1
        time.sleep(.03)


def widgets(w):
    "How many widgets a page is made of."
    return 1 + sum(map(widgets, getattr(w, "children", ())))


@contextlib.contextmanager
def opened(page, **how):
    "A page that is put away at the end."
    shown = page(**how)
    yield shown
    shut(shown)
