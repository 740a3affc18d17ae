"""Many runs that answer one question: sweeps over flags of `moeviz train`, and the studies that moeviz comes with.

Each run is a child process `moeviz train` with a folder of its own, so all commands and pages open it, a crash of one
leaves the others alone, and a study that was cut short goes on from what the folders hold.
"""
