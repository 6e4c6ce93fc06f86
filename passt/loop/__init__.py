"""The event loop: epoll, timers, watches of directories. It calls handlers and knows none of them."""
