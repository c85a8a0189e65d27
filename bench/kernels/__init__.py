"""Every kernel by itself: what it compiles to, what it moves, how long it takes beside what one would use instead."""
