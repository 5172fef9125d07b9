#include <stdio.h>

int main(void)
{
    puts("the job itself");
    return 0;
}
