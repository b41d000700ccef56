"""A worker process that starts and takes no job; started by the tests of the pool."""

import time

if __name__ == "__main__":
    time.sleep(3600)
