"""The one door to the disk: what may be read of a stranger's file, and how everything that is written appears.

read.py       only regular files, never more than was asked for
write.py      one file or folder appears whole, under a name that nobody could foresee until it is
tensors.py    the header of a safetensors file
marker.py     what in a folder is modekit's own, and may be replaced or removed
lock.py       one process at a time
libraries.py  where another library may write
output.py     may this be written, and what of it is surely written
staging.py    a folder in the making, which goes on after a kill and takes its place by rename
change.py     several files of a finished folder, all together
"""
