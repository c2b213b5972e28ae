"""Pages in a real browser."""

from contextlib import contextmanager


@contextmanager
def opened(browser, address: str, width: int = 1200, color_scheme: str = "light"):
    """The page in a browser that is offline; afterwards it must have complained of nothing and asked for nothing."""
    troubles, requests = [], []
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, color_scheme=color_scheme)
    context.set_default_timeout(0)  # a busy machine is no failure
    page = context.new_page()
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert troubles == []
    assert requests == [address]
