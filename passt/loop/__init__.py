"""The event loop: epoll, timers, watches of directories. Handlers are registered; the loop imports none of them."""
