"""What tests of pages need: to wait for a page, to count it, to put it away."""
import threading
import time


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


def shut(w):
    "A page that nobody looks at any more: it does not listen to the language."
    for child in getattr(w, "children", ()): shut(child)
    w.close()
