"""Training of a finished mixture by gradient: `modekit train OUT`.

asked        settings.py, texts.py, request.py: what is to move, towards what, on which text
end to end   end_to_end.py, of moving.py, batches.py, objective.py, losses.py; engine.py judges the states of the
             one training loop (loaded/engine.py)
end          finish.py, write.py: from the best state to a checkpoint and its tables
all of it    train.py; folder.py, of states_folder.py, keeps what a kill must not cost
"""
