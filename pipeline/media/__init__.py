"""One source file understood, with PyAV and numpy alone; knows nothing of data sets, stores or folders.

probe: header and packets, checked against limits. retime: time stamps onto a constant rate. audio_track: sound onto the
time line of the video. picture: a decoded picture to the stored one. yuv: decoded pictures as planes. fragments:
fragmented MP4, encoded and taken apart. reading: reads that fail for a moment or never return.
"""
