"""Work that is spread over the processes and machines of a Ray cluster; ``ray`` is imported only when it is needed."""
