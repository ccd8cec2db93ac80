"""One thread for every process of the suite, those that tests start included.

The models are tiny: one thread is as fast as several, which wait for each other where cores are shared. Whoever sets
OMP_NUM_THREADS has that many.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is first imported, by the tests
