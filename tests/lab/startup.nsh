@echo -off
echo SHELL-UP
map -r
pci
if exist fs0:\mark.txt then
  echo SHELL-MARKED
endif
echo written by the shell > fs0:\mark.txt
type fs0:\mark.txt
setvar LabVariable -guid 8be4df61-93ca-11d2-aa0d-00e098032b8c -nv -bs =0x2a
dmpstore LabVariable -guid 8be4df61-93ca-11d2-aa0d-00e098032b8c
echo SHELL-DONE
reset -s
