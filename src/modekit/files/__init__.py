"""The only access to the disk: what is read of untrusted files, and how everything that is written appears.

read.py, typed.py   only regular files, never more bytes than asked for; small JSON as a type
write.py            one file or folder appears whole; where another library may write
marker.py, lock.py  what in a folder is modekit's own, and may be replaced or removed; which process holds it
output.py           may OUT be written, and what a kill left of it
staging.py          a folder in the making, which appears by rename; the same command continues it after a kill
change.py           several files of a finished folder, all together
user_cache.py       what this user's modekit has proven
figures.py          sizes and times as people read them
"""
