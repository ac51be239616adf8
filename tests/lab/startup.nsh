@echo -off
echo SHELL-UP
if exist fs0:\mark.txt then
  echo SHELL-MARKED
  pci
  dmpstore LabVariable -guid 5a0ab6a4-2f3e-4f6c-9c0b-7c1d9f1e2b3a
  echo SHELL-DONE
  reset -s
endif
echo mark > fs0:\mark.txt
setvar LabVariable -guid 5a0ab6a4-2f3e-4f6c-9c0b-7c1d9f1e2b3a -nv -bs =0x2a
echo SHELL-RESETS
reset -c
