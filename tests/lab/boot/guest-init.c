/* First process of the boot bench's guest: the marker as its first act, then the guest's own clock, and the end when the host
   has had time to settle. */
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

int main(void) {
  char text[64];
  ssize_t length;
  int file;

  if (write(1, "MARKER-UP\n", 10) != 10) return 1;
  mkdir("/proc", 0755);
  if (mount("proc", "/proc", "proc", 0, 0) == 0 && (file = open("/proc/uptime", O_RDONLY)) >= 0 &&
      (length = read(file, text, sizeof text)) > 0) {
    if (write(1, "UPTIME ", 7) != 7 || write(1, text, (size_t)length) != length) return 1;
  }
  sleep(8);
  if (write(1, "SETTLED\n", 8) != 8) return 1;
  reboot(RB_AUTOBOOT);
  return 1;
}
