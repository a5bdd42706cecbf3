"""Training of a finished mixture by gradient: `modekit train OUT`.

asked        settings.py, texts.py, request.py: what is to move, towards what, on which text
end to end   end_to_end.py, of moving.py, low_rank.py, batches.py, teachers.py, objective.py, losses.py;
             engine.py, of trainer.py, log.py: the loop, for whatever is a trained_module.py (students, too)
cheap        cheap.py, of kept.py: gates alone, on kept activations
end          ended.py, finish.py, write.py: from the best state to a checkpoint and its tables
all of it    train.py; folder.py, of states_folder.py, keeps what a kill must not cost
"""
