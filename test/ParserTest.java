import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Named.named;
import static org.junit.jupiter.params.provider.Arguments.arguments;

import java.io.ByteArrayInputStream;
import java.net.UnknownHostException;
import java.text.ParseException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Named;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;

/**
 * What the hook reads from the tables of net-tools, BusyBox, ss and procfs, and what it refuses to take for one.
 *
 * <p>The tables are what net-tools 2.10, BusyBox 1.35, iproute2 6.1 and Linux 6.18 printed, all four of the same
 * sockets in a network namespace of their own. The clients' ends were played by a program on a TUN device, so that the
 * sockets stay in states that otherwise pass in no time. The watched port is 1234.
 */
class ParserTest {

    private static final BuildkitPrestop.Format NETSTAT = BuildkitPrestop.Format.NETSTAT;
    private static final BuildkitPrestop.Format SS = BuildkitPrestop.Format.SS;
    private static final BuildkitPrestop.Format PROCFS = BuildkitPrestop.Format.PROCFS;
    private static final int PORT = 1234;

    /** How many bytes a read may give at once. */
    private static final int[] CHUNKS = {1, 7, Integer.MAX_VALUE};

    /** The columns of procfs behind those that the hook needs: timers, owner, inode. */
    private static final String REST_OF_ROW =
            " 00:00000000 00000000     0        0 73625 1 000000009a8567e4 25 0 0 10 -1";

    /** What a table tells: the number of connections, whether there is a listener, and the peers named. */
    record Seen(int count, boolean listening, List<String> peers) {
    }

    // ---- The same sockets, as each source shows them ---------------------------------------------------------------

    private static final String EVERY_STATE_NET_TOOLS = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
            tcp        0      0 192.0.2.10:1234         0.0.0.0:*               LISTEN    \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41235      FIN_WAIT2 \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41233      SYN_RECV  \s
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41239      CLOSING   \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41231      ESTABLISHED
            tcp        0      1 192.0.2.10:1234         198.51.100.7:41234      FIN_WAIT1 \s
            tcp       77    300 192.0.2.10:1234         198.51.100.7:41232      ESTABLISHED
            tcp        0      1 192.0.2.10:44522        203.0.113.9:1234        SYN_SENT  \s
            tcp        1      0 192.0.2.10:1234         198.51.100.7:41237      CLOSE_WAIT\s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41236      TIME_WAIT \s
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41238      LAST_ACK  \s
            """;

    private static final String EVERY_STATE_BUSYBOX = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State      \s
            tcp        0      0 192.0.2.10:1234         0.0.0.0:*               LISTEN     \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41235      FIN_WAIT2  \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41233      SYN_RECV   \s
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41239      CLOSING    \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41231      ESTABLISHED\s
            tcp        0      1 192.0.2.10:1234         198.51.100.7:41234      FIN_WAIT1  \s
            tcp       77    300 192.0.2.10:1234         198.51.100.7:41232      ESTABLISHED\s
            tcp        0      1 192.0.2.10:44522        203.0.113.9:1234        SYN_SENT   \s
            tcp        1      0 192.0.2.10:1234         198.51.100.7:41237      CLOSE_WAIT \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41236      TIME_WAIT  \s
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41238      LAST_ACK   \s
            """;

    private static final String EVERY_STATE_SS = """
            State      Recv-Q Send-Q Local Address:Port  Peer Address:Port Process
            LISTEN     0      64        192.0.2.10:1234       0.0.0.0:*          \s
            FIN-WAIT-2 0      0         192.0.2.10:1234  198.51.100.7:41235      \s
            SYN-RECV   0      0         192.0.2.10:1234  198.51.100.7:41233      \s
            CLOSING    1      1         192.0.2.10:1234  198.51.100.7:41239      \s
            ESTAB      0      0         192.0.2.10:1234  198.51.100.7:41231      \s
            FIN-WAIT-1 0      1         192.0.2.10:1234  198.51.100.7:41234      \s
            ESTAB      77     300       192.0.2.10:1234  198.51.100.7:41232      \s
            SYN-SENT   0      1         192.0.2.10:44522  203.0.113.9:1234       \s
            CLOSE-WAIT 1      0         192.0.2.10:1234  198.51.100.7:41237      \s
            TIME-WAIT  0      0         192.0.2.10:1234  198.51.100.7:41236      \s
            LAST-ACK   1      1         192.0.2.10:1234  198.51.100.7:41238      \s
            """;

    private static final String EVERY_STATE_TCP = tcp("""
               0: 0A0200C0:04D2 00000000:0000 0A 00000000:00000000
               1: 0A0200C0:04D2 076433C6:A113 05 00000000:00000000
               2: 0A0200C0:04D2 076433C6:A111 03 00000000:00000000
               3: 0A0200C0:04D2 076433C6:A117 0B 00000001:00000001
               4: 0A0200C0:04D2 076433C6:A10F 01 00000000:00000000
               5: 0A0200C0:04D2 076433C6:A112 04 00000001:00000000
               6: 0A0200C0:04D2 076433C6:A110 01 0000012C:0000004D
               7: 0A0200C0:ADEA 097100CB:04D2 02 00000001:00000000
               8: 0A0200C0:04D2 076433C6:A115 08 00000000:00000001
               9: 0A0200C0:04D2 076433C6:A114 06 00000000:00000000
              10: 0A0200C0:04D2 076433C6:A116 09 00000001:00000001
            """);

    private static final String ADDRESSES_NET_TOOLS = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
            tcp6       0      0 :::1234                 :::*                    LISTEN    \s
            tcp6       0      0 192.0.2.10:1234         198.51.100.7:41234      ESTABLISHED
            tcp6       0      0 fe80::1:1234            fe80::1:45678           ESTABLISHED
            tcp6       0      0 192.0.2.10:1234         203.0.113.199:50001     ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1:1234:5:51234 ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1::7:41234     ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1::1234:12340  ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1:0:1:::50007  ESTABLISHED
            tcp6       0      0 fe80::1:45678           fe80::1:1234            ESTABLISHED
            """;

    private static final String ADDRESSES_BUSYBOX = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State      \s
            tcp        0      0 :::1234                 :::*                    LISTEN     \s
            tcp        0      0 ::ffff:192.0.2.10:1234  ::ffff:198.51.100.7:41234 ESTABLISHED\s
            tcp        0      0 fe80::1:1234            fe80::1:45678           ESTABLISHED\s
            tcp        0      0 ::ffff:192.0.2.10:1234  ::ffff:203.0.113.199:50001 ESTABLISHED\s
            tcp        0      0 2001:db8::10:1234       2001:db8:1:1234:5678:9abc:def0:1234:51234 ESTABLISHED\s
            tcp        0      0 2001:db8::10:1234       2001:db8:1::7:41234     ESTABLISHED\s
            tcp        0      0 2001:db8::10:1234       2001:db8:1::1234:12340  ESTABLISHED\s
            tcp        0      0 2001:db8::10:1234       2001:db8:1:0:1:::50007  ESTABLISHED\s
            tcp        0      0 fe80::1:45678           fe80::1:1234            ESTABLISHED\s
            """;

    private static final String ADDRESSES_SS = """
            State  Recv-Q Send-Q       Local Address:Port                           Peer Address:Port Process
            LISTEN 0      64                       *:1234                                      *:*          \s
            ESTAB  0      0      [::ffff:192.0.2.10]:1234                  [::ffff:198.51.100.7]:41234      \s
            ESTAB  0      0             [fe80::1]%lo:1234                              [fe80::1]:45678      \s
            ESTAB  0      0      [::ffff:192.0.2.10]:1234                 [::ffff:203.0.113.199]:50001      \s
            ESTAB  0      0           [2001:db8::10]:1234  [2001:db8:1:1234:5678:9abc:def0:1234]:51234      \s
            ESTAB  0      0           [2001:db8::10]:1234                        [2001:db8:1::7]:41234      \s
            ESTAB  0      0           [2001:db8::10]:1234                     [2001:db8:1::1234]:12340      \s
            ESTAB  0      0           [2001:db8::10]:1234                     [2001:db8:1:0:1::]:50007      \s
            ESTAB  0      0             [fe80::1]%lo:45678                             [fe80::1]:1234       \s
            """;

    private static final String ADDRESSES_TCP6 = tcp6("""
               0: 00000000000000000000000000000000:04D2 00000000000000000000000000000000:0000 0A 00000000:00000000
               1: 0000000000000000FFFF00000A0200C0:04D2 0000000000000000FFFF0000076433C6:A112 01 00000000:00000000
               2: 000080FE000000000000000001000000:04D2 000080FE000000000000000001000000:B26E 01 00000000:00000000
               3: 0000000000000000FFFF00000A0200C0:04D2 0000000000000000FFFF0000C77100CB:C351 01 00000000:00000000
               4: B80D0120000000000000000010000000:04D2 B80D012034120100BC9A78563412F0DE:C822 01 00000000:00000000
               5: B80D0120000000000000000010000000:04D2 B80D0120000001000000000007000000:A112 01 00000000:00000000
               6: B80D0120000000000000000010000000:04D2 B80D0120000001000000000034120000:3034 01 00000000:00000000
               7: B80D0120000000000000000010000000:04D2 B80D0120000001000000010000000000:C357 01 00000000:00000000
               8: 000080FE000000000000000001000000:B26E 000080FE000000000000000001000000:04D2 01 00000000:00000000
            """);

    private static final String LOOK_ALIKES_NET_TOOLS = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
            tcp        0      0 0.0.0.0:1234            0.0.0.0:*               LISTEN    \s
            tcp        0      0 192.0.2.10:234          0.0.0.0:*               LISTEN    \s
            tcp        0      0 192.0.2.10:12345        0.0.0.0:*               LISTEN    \s
            tcp        0      0 192.0.2.10:11234        0.0.0.0:*               LISTEN    \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:12345      ESTABLISHED
            tcp        0      0 192.0.2.11:43210        192.0.2.11:1234         ESTABLISHED
            tcp        0      0 192.0.2.10:1234         198.51.100.7:1234       ESTABLISHED
            tcp        0      0 192.0.2.10:12345        198.51.100.7:41001      ESTABLISHED
            tcp        0      0 192.0.2.10:12345        198.51.100.7:1234       ESTABLISHED
            tcp        0      0 192.0.2.10:234          198.51.100.7:41003      ESTABLISHED
            tcp        0      0 192.0.2.11:1234         192.0.2.11:43210        ESTABLISHED
            tcp        0      0 192.0.2.10:11234        198.51.100.7:41002      ESTABLISHED
            tcp6       0      0 :::12345                :::*                    LISTEN    \s
            tcp6       0      0 2001:db8::10:12345      2001:db8:1::1234:41004  ESTABLISHED
            """;

    private static final String LOOK_ALIKES_BUSYBOX = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State      \s
            tcp        0      0 0.0.0.0:1234            0.0.0.0:*               LISTEN     \s
            tcp        0      0 192.0.2.10:234          0.0.0.0:*               LISTEN     \s
            tcp        0      0 192.0.2.10:12345        0.0.0.0:*               LISTEN     \s
            tcp        0      0 192.0.2.10:11234        0.0.0.0:*               LISTEN     \s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:12345      ESTABLISHED\s
            tcp        0      0 192.0.2.11:43210        192.0.2.11:1234         ESTABLISHED\s
            tcp        0      0 192.0.2.10:1234         198.51.100.7:1234       ESTABLISHED\s
            tcp        0      0 192.0.2.10:12345        198.51.100.7:41001      ESTABLISHED\s
            tcp        0      0 192.0.2.10:12345        198.51.100.7:1234       ESTABLISHED\s
            tcp        0      0 192.0.2.10:234          198.51.100.7:41003      ESTABLISHED\s
            tcp        0      0 192.0.2.11:1234         192.0.2.11:43210        ESTABLISHED\s
            tcp        0      0 192.0.2.10:11234        198.51.100.7:41002      ESTABLISHED\s
            tcp        0      0 :::12345                :::*                    LISTEN     \s
            tcp        0      0 2001:db8::10:12345      2001:db8:1::1234:41004  ESTABLISHED\s
            """;

    private static final String LOOK_ALIKES_SS = """
            State  Recv-Q Send-Q  Local Address:Port        Peer Address:Port Process
            LISTEN 0      64            0.0.0.0:1234             0.0.0.0:*          \s
            LISTEN 0      64         192.0.2.10:234              0.0.0.0:*          \s
            LISTEN 0      64         192.0.2.10:12345            0.0.0.0:*          \s
            LISTEN 0      64         192.0.2.10:11234            0.0.0.0:*          \s
            ESTAB  0      0          192.0.2.10:1234        198.51.100.7:12345      \s
            ESTAB  0      0          192.0.2.11:43210         192.0.2.11:1234       \s
            ESTAB  0      0          192.0.2.10:1234        198.51.100.7:1234       \s
            ESTAB  0      0          192.0.2.10:12345       198.51.100.7:41001      \s
            ESTAB  0      0          192.0.2.10:12345       198.51.100.7:1234       \s
            ESTAB  0      0          192.0.2.10:234         198.51.100.7:41003      \s
            ESTAB  0      0          192.0.2.11:1234          192.0.2.11:43210      \s
            ESTAB  0      0          192.0.2.10:11234       198.51.100.7:41002      \s
            LISTEN 0      64               [::]:12345               [::]:*          \s
            ESTAB  0      0      [2001:db8::10]:12345 [2001:db8:1::1234]:41004      \s
            """;

    private static final String LOOK_ALIKES_TCP = tcp("""
               0: 00000000:04D2 00000000:0000 0A 00000000:00000000
               1: 0A0200C0:00EA 00000000:0000 0A 00000000:00000000
               2: 0A0200C0:3039 00000000:0000 0A 00000000:00000000
               3: 0A0200C0:2BE2 00000000:0000 0A 00000000:00000000
               4: 0A0200C0:04D2 076433C6:3039 01 00000000:00000000
               5: 0B0200C0:A8CA 0B0200C0:04D2 01 00000000:00000000
               6: 0A0200C0:04D2 076433C6:04D2 01 00000000:00000000
               7: 0A0200C0:3039 076433C6:A029 01 00000000:00000000
               8: 0A0200C0:3039 076433C6:04D2 01 00000000:00000000
               9: 0A0200C0:00EA 076433C6:A02B 01 00000000:00000000
              10: 0B0200C0:04D2 0B0200C0:A8CA 01 00000000:00000000
              11: 0A0200C0:2BE2 076433C6:A02A 01 00000000:00000000
            """);

    private static final String LOOK_ALIKES_TCP6 = tcp6("""
               0: 00000000000000000000000000000000:3039 00000000000000000000000000000000:0000 0A 00000000:00000000
               1: B80D0120000000000000000010000000:3039 B80D0120000001000000000034120000:A02C 01 00000000:00000000
            """);

    // ---- Tables that are read --------------------------------------------------------------------------------------

    private static Stream<Arguments> realTables() {
        Seen established = new Seen(2, true, List.of("198.51.100.7:41231", "198.51.100.7:41232"));
        Seen addresses = new Seen(7, true, List.of("198.51.100.7:41234", "[fe80::1]:45678", "203.0.113.199:50001",
                "[2001:db8:1:1234:5678:9abc:def0:1234]:51234", "[2001:db8:1::7]:41234"));
        Seen addressesCut = new Seen(7, true, List.of("198.51.100.7:41234", "[fe80::1]:45678", "203.0.113.199:50001",
                "[2001:db8:1:1234:5]:51234", "[2001:db8:1::7]:41234"));
        Seen onePort = new Seen(3, true, List.of("198.51.100.7:12345", "198.51.100.7:1234", "192.0.2.11:43210"));
        return Stream.of(
                arguments("every state, net-tools", NETSTAT, List.of(EVERY_STATE_NET_TOOLS), established),
                arguments("every state, BusyBox", NETSTAT, List.of(EVERY_STATE_BUSYBOX), established),
                arguments("every state, ss", SS, List.of(EVERY_STATE_SS), established),
                arguments("every state, procfs", PROCFS, List.of(EVERY_STATE_TCP), established),
                arguments("addresses, net-tools", NETSTAT, List.of(ADDRESSES_NET_TOOLS), addressesCut),
                arguments("addresses, BusyBox", NETSTAT, List.of(ADDRESSES_BUSYBOX), addresses),
                arguments("addresses, ss", SS, List.of(ADDRESSES_SS), addresses),
                arguments("addresses, procfs", PROCFS, List.of(tcp(""), ADDRESSES_TCP6), addresses),
                arguments("look-alikes, net-tools", NETSTAT, List.of(LOOK_ALIKES_NET_TOOLS), onePort),
                arguments("look-alikes, BusyBox", NETSTAT, List.of(LOOK_ALIKES_BUSYBOX), onePort),
                arguments("look-alikes, ss", SS, List.of(LOOK_ALIKES_SS), onePort),
                arguments("look-alikes, procfs", PROCFS, List.of(LOOK_ALIKES_TCP, LOOK_ALIKES_TCP6), onePort));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("realTables")
    void countsAndNamesTheEstablishedConnectionsToThePortAndNothingElse(
            String name, BuildkitPrestop.Format format, List<String> tables, Seen expected) throws Exception {
        assertThat(read(format, tables.toArray(String[]::new))).isEqualTo(expected);
    }

    private static Stream<Arguments> tablesWithOwners() {
        return Stream.of(
                arguments("net-tools", NETSTAT, """
                        Active Internet connections (servers and established)
                        Proto Recv-Q Send-Q Local Address           Foreign Address         State       \
                        PID/Program name   \s
                        tcp        0      0 192.0.2.10:1234         0.0.0.0:*               LISTEN      \
                        15086/python3      \s
                        tcp       77    300 192.0.2.10:1234         198.51.100.7:41234      ESTABLISHED \
                        15086/python3      \s
                        tcp        0      0 192.0.2.10:1234         198.51.100.7:41236      TIME_WAIT   \
                        -                  \s
                        """),
                arguments("BusyBox of Alpine", NETSTAT, """
                        Active Internet connections (servers and established)
                        Proto Recv-Q Send-Q Local Address           Foreign Address         State       \
                        PID/Program name   \s
                        tcp        0      0 :::1234                 :::*                    LISTEN      1/buildkitd
                        tcp       77    300 ::ffff:192.0.2.10:1234  ::ffff:198.51.100.7:41234 ESTABLISHED 1/buildkitd
                        tcp        0      0 ::ffff:192.0.2.10:1234  ::ffff:198.51.100.7:41236 TIME_WAIT   -
                        """),
                arguments("ss", SS, """
                        State      Recv-Q Send-Q Local Address:Port  Peer Address:Port Process\
                                                    \s
                        LISTEN     0      64        192.0.2.10:1234       0.0.0.0:*     \
                        users:(("python3",pid=15086,fd=5))\s
                        ESTAB      77     300       192.0.2.10:1234  198.51.100.7:41234 \
                        users:(("python3",pid=15086,fd=7))\s
                        TIME-WAIT  0      0         192.0.2.10:1234  198.51.100.7:41236 \
                                                          \s
                        """));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("tablesWithOwners")
    void readsPastTheColumnOfTheOwningProcess(String name, BuildkitPrestop.Format format, String table)
            throws Exception {
        assertThat(read(format, table)).isEqualTo(new Seen(1, true, List.of("198.51.100.7:41234")));
    }

    private static Stream<Arguments> everyState() {
        return Map.of(
                NETSTAT, "ESTABLISHED SYN_SENT SYN_RECV FIN_WAIT1 FIN_WAIT2 TIME_WAIT CLOSE CLOSE_WAIT LAST_ACK"
                        + " LISTEN CLOSING UNKNOWN",
                SS, "ESTAB SYN-SENT SYN-RECV FIN-WAIT-1 FIN-WAIT-2 TIME-WAIT UNCONN CLOSE-WAIT LAST-ACK LISTEN"
                        + " CLOSING UNKNOWN",
                PROCFS, "01 02 03 04 05 06 07 08 09 0A 0B 0C 0D")
                .entrySet().stream().flatMap(states -> Stream.of(states.getValue().split(" "))
                        .map(state -> arguments(state, states.getKey())));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("everyState")
    void countsNoStateButEstablished(String state, BuildkitPrestop.Format format) throws Exception {
        boolean established = state.matches("ESTAB(LISHED)?|01");
        boolean listening = state.matches("LISTEN|0A");
        assertThat(read(format, table(format, row(format, state))))
                .isEqualTo(established ? new Seen(1, false, List.of("192.0.2.7:41234"))
                        : new Seen(0, listening, List.of()));
    }

    private static Stream<Arguments> samePeer() {
        return Stream.of(
                arguments("10.0.0.7:41234", "10.0.0.7", "10.0.0.7", "0700000A"),
                arguments("10.0.0.7:41234", "::ffff:10.0.0.7", "[::ffff:10.0.0.7]", "0000000000000000FFFF00000700000A"),
                arguments("127.0.0.1:41234", "127.0.0.1", "127.0.0.1", "0100007F"),
                arguments("[::1]:41234", "::1", "[::1]", "00000000000000000000000001000000"),
                arguments("[2001:db8::7]:41234", "2001:db8::7", "[2001:db8::7]", "B80D0120000000000000000007000000"),
                arguments("[2001:db8:1:0:1::]:41234", "2001:db8:1:0:1::", "[2001:db8:1:0:1::]",
                        "B80D0120000001000000010000000000"),
                arguments("[2001:db8:0:0:1::]:41234", "2001:db8:0:0:1::", "[2001:db8:0:0:1::]",
                        "B80D0120000000000000010000000000"),
                arguments("[::]:41234", "::", "[::]", "00000000000000000000000000000000"),
                arguments("[fe80::1]:41234", "fe80::1", "[fe80::1]", "000080FE000000000000000001000000"));
    }

    @ParameterizedTest(name = "{0} of {1}")
    @MethodSource("samePeer")
    void namesAPeerTheSameWhicheverTheSource(String expected, String netstat, String ss, String procfs)
            throws Exception {
        String tcp = "   0: 0A0200C0:04D2 " + procfs + ":A112 01";
        assertThat(List.of(
                read(NETSTAT, table(NETSTAT, "tcp 0 0 :::1234 " + netstat + ":41234 ESTABLISHED")),
                read(SS, table(SS, "ESTAB 0 0 [::]:1234 " + ss + ":41234")),
                read(PROCFS, table(PROCFS, tcp + " 00000000:00000000" + REST_OF_ROW))))
                .containsOnly(new Seen(1, false, List.of(expected)));
    }

    @Test
    void namesAPeerOnPort0TheSameWhicheverTheSource() throws Exception {
        assertThat(List.of(
                read(NETSTAT, table(NETSTAT, "tcp 0 0 192.0.2.10:1234 198.51.100.7:* ESTABLISHED")),
                read(SS, table(SS, "ESTAB 0 0 192.0.2.10:1234 198.51.100.7:*")),
                read(PROCFS, table(PROCFS, "   0: 0A0200C0:04D2 076433C6:0000 01 00000000:00000000" + REST_OF_ROW))))
                .containsOnly(new Seen(1, false, List.of("198.51.100.7:0")));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("formats")
    void countsARowThatTheKernelShowsTwiceOnce(BuildkitPrestop.Format format) throws Exception {
        String row = row(format, format.established());
        assertThat(read(format, table(format, row, row)).count()).isEqualTo(1);
    }

    @Test
    void readsThePortOfAnAddressThatNetToolsCutOff() throws Exception {
        assertThat(read(NETSTAT, """
                Active Internet connections (servers and established)
                Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
                tcp6       0      0 2001:db8:10:1234:1:1234 2001:db8:1:0:1:2::41003 ESTABLISHED
                tcp6       0      0 2001:db8:10:1234::41234 2001:db8:10:1234:1:1234 ESTABLISHED
                """)).isEqualTo(new Seen(1, false, List.of("[2001:db8:1:0:1:2:]:41003")));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("formats")
    void namesFivePeersAndCountsAll(BuildkitPrestop.Format format) throws Exception {
        String[] rows = new String[200];
        for (int i = 0; i < rows.length; i++) {
            rows[i] = row(format, format.established()).replace("41234", String.valueOf(20000 + i))
                    .replace("A112", Integer.toHexString(20000 + i).toUpperCase());
        }
        assertThat(read(format, table(format, rows))).isEqualTo(new Seen(200, false, List.of("192.0.2.7:20000",
                "192.0.2.7:20001", "192.0.2.7:20002", "192.0.2.7:20003", "192.0.2.7:20004")));
    }

    private static Stream<Arguments> emptyTables() {
        return Stream.of(
                arguments("net-tools or BusyBox", NETSTAT, List.of(table(NETSTAT))),
                arguments("ss", SS, List.of("State Recv-Q Send-Q Local Address:Port Peer Address:PortProcess\n")),
                arguments("procfs", PROCFS, List.of(tcp(""), tcp6(""))),
                arguments("procfs without IPv6", PROCFS, List.of(tcp(""))));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("emptyTables")
    void takesAHeadingWithoutRowsForNoConnection(String name, BuildkitPrestop.Format format, List<String> tables)
            throws Exception {
        assertThat(read(format, tables.toArray(String[]::new))).isEqualTo(new Seen(0, false, List.of()));
    }

    // ---- What is refused -------------------------------------------------------------------------------------------

    private static Stream<Named<BuildkitPrestop.Format>> formats() {
        return Stream.of(named("netstat", NETSTAT), named("ss", SS), named("procfs", PROCFS));
    }

    private static Stream<Arguments> noTables() {
        return formats().flatMap(source -> {
            BuildkitPrestop.Format format = source.getPayload();
            String row = row(format, format.established());
            String heading = table(format);
            return Map.ofEntries(
                    Map.entry("nothing", ""),
                    Map.entry("an empty line", "\n"),
                    Map.entry("rows without a heading", row + "\n"),
                    Map.entry("a heading cut off", heading.substring(0, heading.length() - 20)),
                    Map.entry("a heading without its newline", heading.strip()),
                    Map.entry("a last row cut off", heading + row + "\n" + row.substring(0, row.length() / 2)),
                    Map.entry("a last row without its newline", heading + row + "\n" + row),
                    Map.entry("a row cut off before its newline", table(format, row.substring(0, 25), row)),
                    Map.entry("a row cut off before its state",
                            table(format, row.substring(0, row.indexOf(format.established())), row)),
                    Map.entry("an error message instead of a table", "ss: cannot open netlink socket\n"),
                    Map.entry("an error message before the table", "sh: warning\n" + table(format, row)),
                    Map.entry("an error message between the rows", table(format, row, "read error: I/O error", row)),
                    Map.entry("an error message after the rows", table(format, row, "killed")),
                    Map.entry("an empty line between the rows", table(format, row, "", row)),
                    Map.entry("a second heading", table(format, row) + table(format, row)),
                    Map.entry("garbage", "1234 ESTABLISHED :1234 ESTAB 04D2 01\n".repeat(3)),
                    Map.entry("bytes", "\u007fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>\0\1\0\0\0\n\377\376\r\n"),
                    Map.entry("a table with NUL bytes", table(format, row.replace(" ", "\0"))),
                    Map.entry("a line without an end", "x".repeat(10_000)),
                    Map.entry("a row without an end", heading + row + " ".repeat(10_000)),
                    Map.entry("a long row with an end", heading + row + " ".repeat(5_000) + "\n"))
                    .entrySet().stream()
                    .map(text -> arguments(text.getKey() + ", " + source.getName(), format, text.getValue()));
        });
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource({"noTables", "noTablesOfTheTools"})
    void refusesWhatIsNotAWholeTable(String name, BuildkitPrestop.Format format, String text) {
        for (int chunk : CHUNKS) {
            assertThatThrownBy(() -> read(format, chunk, text))
                    .isInstanceOfAny(ParseException.class, UnknownHostException.class);
        }
    }

    private static Stream<Arguments> noTablesOfTheTools() {
        return Stream.of(
                arguments("usage of BusyBox", NETSTAT, """
                        netstat: invalid option -- 'p'
                        BusyBox v1.35.0 (Debian 1:1.35.0-4+deb12u1+b1) multi-call binary.

                        Usage: netstat [-ral] [-tuwx] [-en]

                        Display networking information

                        \t-r\tRouting table
                        \t-a\tAll sockets
                        """),
                arguments("net-tools in German", NETSTAT, """
                        Aktive Internetverbindungen (Server und stehende Verbindungen)
                        Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
                        tcp        0      0 192.0.2.10:1234         198.51.100.7:41234      VERBUNDEN \s
                        """),
                arguments("net-tools, heading of one line only", NETSTAT,
                        "Active Internet connections (servers and established)\n"),
                arguments("net-tools, a kernel without TCP", NETSTAT, """
                        Active Internet connections (servers and established)
                        Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
                        netstat: no support for `AF INET (tcp)' on this system.
                        """),
                arguments("net-tools, UNIX domain sockets", NETSTAT, """
                        Active UNIX domain sockets (servers and established)
                        Proto RefCnt Flags       Type       State         I-Node   Path
                        unix  2      [ ACC ]     STREAM     LISTENING     1234     /run/buildkit/buildkitd.sock
                        """),
                arguments("ss of every kind of socket", SS, """
                        Netid State  Recv-Q Send-Q Local Address:Port Peer Address:PortProcess
                        tcp   ESTAB  0      0         192.0.2.10:1234 198.51.100.7:41234     \s
                        """),
                arguments("the table of another format", SS, EVERY_STATE_NET_TOOLS),
                arguments("the table of another format", NETSTAT, EVERY_STATE_SS),
                arguments("the table of another format", PROCFS, EVERY_STATE_BUSYBOX),
                arguments("an address of a length that no address has", PROCFS,
                        tcp("   0: 0A0200C0:04D2 00000A0700000A07:A112 01 00000000:00000000\n")));
    }

    @Test
    void doesNotTakeASecondTableThatIsMissingForAnEmptyOne() {
        assertThatThrownBy(() -> read(PROCFS, ADDRESSES_TCP6, ""))
                    .isInstanceOfAny(ParseException.class, UnknownHostException.class);
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    /** The tool's heading and these rows. */
    private static String table(BuildkitPrestop.Format format, String... rows) {
        String heading = format == PROCFS ? tcp("") : (format == SS ? EVERY_STATE_SS
                : EVERY_STATE_NET_TOOLS).lines().takeWhile(line -> !line.contains("LISTEN"))
                .collect(Collectors.joining("\n", "", "\n"));
        return heading + Stream.of(rows).map(row -> row + "\n").collect(Collectors.joining());
    }

    /** A row of a socket of the watched port, whose peer is 192.0.2.7:41234. */
    private static String row(BuildkitPrestop.Format format, String state) {
        if (format == SS) {
            return "%-10s 0      0         192.0.2.10:1234     192.0.2.7:41234       ".formatted(state);
        }
        return format == NETSTAT
                ? "tcp        0      0 192.0.2.10:1234         192.0.2.7:41234         %-11s".formatted(state)
                : "   0: 0A0200C0:04D2 070200C0:A112 " + state + " 00000000:00000000" + REST_OF_ROW;
    }

    /** Adds what /proc/net/tcp has around such rows. */
    private static String tcp(String rows) {
        return "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
                + " ".repeat(53) + "\n" + rows.replace("\n", REST_OF_ROW + " ".repeat(21) + "\n");
    }

    /** Adds what /proc/net/tcp6 has around such rows. */
    private static String tcp6(String rows) {
        return "  sl  local_address                         remote_address                        st tx_queue rx_queue"
                + " tr tm->when retrnsmt   uid  timeout inode\n" + rows.replace("\n", REST_OF_ROW + "\n");
    }

    /** Reads the tables one after the other, as a whole and in pieces, which must make no difference. */
    private static Seen read(BuildkitPrestop.Format format, String... tables) throws Exception {
        List<Seen> seen = new ArrayList<>();
        for (int chunk : CHUNKS) {
            seen.add(read(format, chunk, tables));
        }
        assertThat(seen).containsOnly(seen.get(0));
        return seen.get(0);
    }

    private static Seen read(BuildkitPrestop.Format format, int chunk, String... tables) throws Exception {
        BuildkitPrestop.Connections connections = new BuildkitPrestop.Connections();
        for (String table : tables) {
            ByteArrayInputStream in = new ByteArrayInputStream(table.getBytes(StandardCharsets.ISO_8859_1));
            format.parse((buffer, offset, length) -> in.read(buffer, offset, Math.min(length, chunk)),
                    PORT, connections);
        }
        return new Seen(connections.count, connections.listening, List.copyOf(connections.peers));
    }
}
