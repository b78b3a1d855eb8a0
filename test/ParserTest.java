import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.params.provider.Arguments.arguments;

import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.EnumSource;
import org.junit.jupiter.params.provider.MethodSource;

/**
 * What the hook reads from the tables of net-tools, BusyBox, ss and procfs, and what it refuses to take for one.
 *
 * <p>The tables are what net-tools 2.10, BusyBox 1.35, iproute2 6.1 and Linux 6.18 printed, all four of the same
 * sockets in a network namespace of their own. In those of every state and of addresses, asked for TCP only, the
 * clients' ends were played by a program on a TUN device, so that the sockets stay in states that otherwise pass in no
 * time. The watched port is 1234, the socket buildkitd.sock.
 */
class ParserTest {

    private static final int PORT = 1234;

    /** How many bytes a read may give at once. */
    private static final int[] CHUNKS = {1, 7, Integer.MAX_VALUE};

    /** The columns of procfs behind those that the hook needs: timers, owner, inode. */
    private static final String REST_OF_ROW =
            " 00:00000000 00000000     0        0 73625 1 000000009a8567e4 25 0 0 10 -1";

    /** What tables tell: how many connections of each kind, who listens, and the peers named. */
    record Seen(int tcp, int unix, boolean portListens, boolean socketListens, List<String> peers) {
        static Seen ofTcp(int tcp, boolean listening, String... peers) {
            return new Seen(tcp, 0, listening, false, List.of(peers));
        }

        static Seen ofUnix(int unix, boolean listening) {
            return new Seen(0, unix, false, listening, List.of());
        }
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

    /** The same, but for one blank more behind each state. */
    private static final String EVERY_STATE_BUSYBOX = EVERY_STATE_NET_TOOLS.replaceAll("(?m)^((tcp|Proto).*)$", "$1 ");

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

    /** What netstat prints behind its table of TCP where there is no unix socket. */
    private static final String NO_UNIX = """
            Active UNIX domain sockets (servers and established)
            Proto RefCnt Flags       Type       State         I-Node   Path
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

    private static final String UNIX_NET_TOOLS = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
            tcp        0      0 127.0.0.1:1234          0.0.0.0:*               LISTEN    \s
            tcp        0      0 127.0.0.1:1234          127.0.0.1:41234         ESTABLISHED
            tcp        0      0 127.0.0.1:41234         127.0.0.1:1234          ESTABLISHED
            Active UNIX domain sockets (servers and established)
            Proto RefCnt Flags       Type       State         I-Node   Path
            unix  2      [ ACC ]     STREAM     LISTENING     3736982  /run/buildkit/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736985  /run/client
            unix  2      [ ACC ]     STREAM     LISTENING     3736988  /run/xbuildkitd.sock
            unix  2      [ ACC ]     STREAM     LISTENING     3736991  /run/my
            unix  3      [ ]         DGRAM      CONNECTED     3736997  /run/other/log
            unix  2      [ ]         DGRAM      CONNECTED     3736998  /run/dgram/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736989 \s
            unix  2      [ ACC ]     SEQPACKET  LISTENING     3736999  /run/other/buildkitd.sock
            unix  2      [ ]         STREAM                   3737002  /run/idle
            unix  3      [ ]         STREAM     CONNECTED     3736996  @buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736992 \s
            unix  3      [ ]         SEQPACKET  CONNECTED     3737000 \s
            unix  3      [ ]         STREAM     CONNECTED     3736983 \s
            unix  3      [ ]         STREAM     CONNECTED     3736993  /run/my
            unix  3      [ ]         STREAM     CONNECTED     3736987 \s
            unix  3      [ ]         STREAM     CONNECTED     3736995 \s
            unix  3      [ ]         STREAM     CONNECTING    0        /run/buildkit/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736990  /run/xbuildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736984  /run/buildkit/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736986  /run/buildkit/buildkitd.sock
            unix  3      [ ]         SEQPACKET  CONNECTED     3737001  /run/other/buildkitd.sock
            unix  2      [ ACC ]     STREAM     LISTENING     3736994  @buildkitd.sock
            """;

    private static final String UNIX_BUSYBOX = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State      \s
            tcp        0      0 127.0.0.1:1234          0.0.0.0:*               LISTEN     \s
            tcp        0      0 127.0.0.1:1234          127.0.0.1:41234         ESTABLISHED\s
            tcp        0      0 127.0.0.1:41234         127.0.0.1:1234          ESTABLISHED\s
            Active UNIX domain sockets (servers and established)
            Proto RefCnt Flags       Type       State         I-Node Path
            unix  2      [ ACC ]     STREAM     LISTENING     3736982 /run/buildkit/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736985 /run/client
            unix  2      [ ACC ]     STREAM     LISTENING     3736988 /run/xbuildkitd.sock
            unix  2      [ ACC ]     STREAM     LISTENING     3736991 /run/my buildkitd.sock
            unix  3      [ ]         DGRAM      CONNECTED     3736997 /run/other/log
            unix  2      [ ]         DGRAM      CONNECTED     3736998 /run/dgram/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736989\s
            unix  2      [ ACC ]     SEQPACKET  LISTENING     3736999 /run/other/buildkitd.sock
            unix  2      [ ]         STREAM                   3737002 /run/idle
            unix  3      [ ]         STREAM     CONNECTED     3736996 @buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736992\s
            unix  3      [ ]         SEQPACKET  CONNECTED     3737000\s
            unix  3      [ ]         STREAM     CONNECTED     3736983\s
            unix  3      [ ]         STREAM     CONNECTED     3736993 /run/my buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736987\s
            unix  3      [ ]         STREAM     CONNECTED     3736995\s
            unix  3      [ ]         STREAM     CONNECTING         0 /run/buildkit/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736990 /run/xbuildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736984 /run/buildkit/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     3736986 /run/buildkit/buildkitd.sock
            unix  3      [ ]         SEQPACKET  CONNECTED     3737001 /run/other/buildkitd.sock
            unix  2      [ ACC ]     STREAM     LISTENING     3736994 @buildkitd.sock
            """;

    private static final String UNIX_SS = """
            Netid State  Recv-Q Send-Q                Local Address:Port    Peer Address:Port   Process
            u_str LISTEN 1      5      /run/buildkit/buildkitd.sock 3736982            * 0            \s
            u_str ESTAB  0      0                       /run/client 3736985            * 3736986      \s
            u_str LISTEN 0      5              /run/xbuildkitd.sock 3736988            * 0            \s
            u_str LISTEN 0      5            /run/my buildkitd.sock 3736991            * 0            \s
            u_dgr ESTAB  0      0                    /run/other/log 3736997            * 0            \s
            u_dgr ESTAB  0      0         /run/dgram/buildkitd.sock 3736998            * 3736997      \s
            u_str ESTAB  0      0                                 * 3736989            * 3736990      \s
            u_seq LISTEN 0      5         /run/other/buildkitd.sock 3736999            * 0            \s
            u_str UNCONN 0      0                         /run/idle 3737002            * 0            \s
            u_str ESTAB  0      0                   @buildkitd.sock 3736996            * 3736995      \s
            u_str ESTAB  0      0                                 * 3736992            * 3736993      \s
            u_seq ESTAB  0      0                                 * 3737000            * 3737001      \s
            u_str ESTAB  0      0                                 * 3736983            * 3736984      \s
            u_str ESTAB  0      0            /run/my buildkitd.sock 3736993            * 3736992      \s
            u_str ESTAB  0      0                                 * 3736987            * 0            \s
            u_str ESTAB  0      0                                 * 3736995            * 3736996      \s
            u_str ESTAB  0      0              /run/xbuildkitd.sock 3736990            * 3736989      \s
            u_str ESTAB  0      0      /run/buildkit/buildkitd.sock 3736984            * 3736983      \s
            u_str ESTAB  0      0      /run/buildkit/buildkitd.sock 3736986            * 3736985      \s
            u_seq ESTAB  0      0         /run/other/buildkitd.sock 3737001            * 3737000      \s
            u_str LISTEN 0      5                   @buildkitd.sock 3736994            * 0            \s
            tcp   LISTEN 0      5                         127.0.0.1:1234         0.0.0.0:*            \s
            tcp   ESTAB  0      0                         127.0.0.1:1234       127.0.0.1:41234        \s
            tcp   ESTAB  0      0                         127.0.0.1:41234      127.0.0.1:1234         \s
            """;

    private static final String UNIX_PROCFS = """
            Num       RefCount Protocol Flags    Type St Inode Path
            00000000133f0779: 00000002 00000000 00010000 0001 01 3736982 /run/buildkit/buildkitd.sock
            000000002972e75c: 00000003 00000000 00000000 0001 03 3736985 /run/client
            00000000f405f4dc: 00000002 00000000 00010000 0001 01 3736988 /run/xbuildkitd.sock
            000000005543845b: 00000002 00000000 00010000 0001 01 3736991 /run/my buildkitd.sock
            00000000ddfa8fbf: 00000003 00000000 00000000 0002 03 3736997 /run/other/log
            00000000d93b0a9b: 00000002 00000000 00000000 0002 03 3736998 /run/dgram/buildkitd.sock
            000000006345e49c: 00000003 00000000 00000000 0001 03 3736989
            00000000f621b874: 00000002 00000000 00010000 0005 01 3736999 /run/other/buildkitd.sock
            000000008718c0ce: 00000002 00000000 00000000 0001 01 3737002 /run/idle
            000000009a62f582: 00000003 00000000 00000000 0001 03 3736996 @buildkitd.sock
            0000000016ccd8fe: 00000003 00000000 00000000 0001 03 3736992
            00000000af38e447: 00000003 00000000 00000000 0005 03 3737000
            000000009a302663: 00000003 00000000 00000000 0001 03 3736983
            0000000082a5bee4: 00000003 00000000 00000000 0001 03 3736993 /run/my buildkitd.sock
            000000007d3994b9: 00000003 00000000 00000000 0001 03 3736987
            000000005f511804: 00000003 00000000 00000000 0001 03 3736995
            00000000e726b66a: 00000003 00000000 00000000 0001 02     0 /run/buildkit/buildkitd.sock
            000000002145c0e1: 00000003 00000000 00000000 0001 03 3736990 /run/xbuildkitd.sock
            000000008bf110c4: 00000003 00000000 00000000 0001 03 3736984 /run/buildkit/buildkitd.sock
            00000000610a41ea: 00000003 00000000 00000000 0001 03 3736986 /run/buildkit/buildkitd.sock
            0000000093935801: 00000003 00000000 00000000 0005 03 3737001 /run/other/buildkitd.sock
            000000003888e457: 00000002 00000000 00010000 0001 01 3736994 @buildkitd.sock
            """;

    private static final String UNIX_PROCFS_TCP = tcp("""
               0: 0100007F:04D2 00000000:0000 0A 00000000:00000000
               1: 0100007F:04D2 0100007F:A112 01 00000000:00000000
               2: 0100007F:A112 0100007F:04D2 01 00000000:00000000
            """);

    // ---- Tables that are read --------------------------------------------------------------------------------------

    private static Stream<Arguments> realTables() {
        Seen established = Seen.ofTcp(2, true, "198.51.100.7:41231", "198.51.100.7:41232");
        String[] peers = {"198.51.100.7:41234", "[fe80::1]:45678", "203.0.113.199:50001",
            "[2001:db8:1:1234:5678:9abc:def0:1234]:51234", "[2001:db8:1::7]:41234", "[2001:db8:1::1234]:12340",
            "[2001:db8:1:0:1::]:50007"};
        Seen addresses = Seen.ofTcp(7, true, peers.clone());
        peers[3] = "[2001:db8:1:1234:5]:51234";
        Seen addressesCut = Seen.ofTcp(7, true, peers);
        Seen both = new Seen(1, 2, true, true, List.of("127.0.0.1:41234"));
        return Stream.of(
                arguments("every state, net-tools", Source.netstat, List.of(EVERY_STATE_NET_TOOLS + NO_UNIX),
                        established),
                arguments("every state, BusyBox", Source.netstat, List.of(EVERY_STATE_BUSYBOX + NO_UNIX), established),
                arguments("every state, ss", Source.ss, List.of(withNetid(EVERY_STATE_SS)), established),
                arguments("every state, procfs", Source.procfs, List.of(EVERY_STATE_TCP), established),
                arguments("addresses, net-tools", Source.netstat, List.of(ADDRESSES_NET_TOOLS + NO_UNIX), addressesCut),
                arguments("addresses, BusyBox", Source.netstat, List.of(ADDRESSES_BUSYBOX + NO_UNIX), addresses),
                arguments("addresses, ss", Source.ss, List.of(withNetid(ADDRESSES_SS)), addresses),
                arguments("addresses, procfs", Source.procfs, List.of(tcp(""), ADDRESSES_TCP6), addresses),
                arguments("unix, net-tools", Source.netstat, List.of(UNIX_NET_TOOLS), both),
                arguments("unix, BusyBox", Source.netstat, List.of(UNIX_BUSYBOX), both),
                arguments("unix, ss", Source.ss, List.of(UNIX_SS), both),
                arguments("unix, procfs", Source.procfs, List.of(UNIX_PROCFS_TCP, tcp6(""), UNIX_PROCFS), both));
    }

    @ParameterizedTest(name = "{0}")
    @MethodSource("realTables")
    void countsAndNamesTheConnectionsOfBuildkitdAndNothingElse(
            String name, Source source, List<String> tables, Seen expected) throws Exception {
        assertThat(read(source, tables.toArray(String[]::new))).isEqualTo(expected);
    }

    /** Rows of a unix socket as netstat, ss and procfs write them; the path follows, in ss with what stands behind. */
    @ParameterizedTest(name = "{0}")
    @CsvSource({
        "connected, 1, unix 3 [ ] STREAM CONNECTED 77, u_str ESTAB 0 0, 00000000 0001 03 77",
        "listening, 0, unix 2 [ ACC ] STREAM LISTENING 77, u_str LISTEN 0 5, 00010000 0001 01 77",
        "not accepted, 0, unix 3 [ ] STREAM CONNECTING 0, u_str SYN-SENT 0 0, 00000000 0001 02 0",
        "closing, 0, unix 3 [ ] STREAM DISCONNECTING 77, u_str CLOSING 0 0, 00000000 0001 04 77",
        "of no state, 0, unix 2 [ ] STREAM 77, u_str UNCONN 0 0, 00000000 0001 01 77",
        "datagrams, 0, unix 2 [ ] DGRAM CONNECTED 77, u_dgr ESTAB 0 0, 00000000 0002 03 77",
        "datagrams of no state, 0, unix 2 [ ] DGRAM 77, u_dgr UNCONN 0 0, 00000000 0002 01 77",
        "packets, 0, unix 3 [ ] SEQPACKET CONNECTED 77, u_seq ESTAB 0 0, 00000000 0005 03 77",
        "packets listening, 0, unix 3 [ W ACC N ] SEQPACKET LISTENING 77, u_seq LISTEN 0 0, 00010000 0005 01 77"})
    void countsNoUnixSocketButAConnectedStream(String state, int count, String netstat, String ss, String procfs)
            throws Exception {
        Seen expected = Seen.ofUnix(count, state.equals("listening"));
        String path = " /run/buildkit/buildkitd.sock";
        assertThat(read(Source.netstat, netstatUnix(netstat + path))).isEqualTo(expected);
        assertThat(read(Source.ss, ssUnix(ss + path + " 77 * 0"))).isEqualTo(expected);
        assertThat(read(Source.procfs, procfsUnix("0: 00000003 00000000 " + procfs + path))).isEqualTo(expected);
    }

    @ParameterizedTest
    @CsvSource({
        "buildkitd.sock, /run/buildkit/buildkitd.sock, 1", "buildkitd.sock, buildkitd.sock, 1",
        "buildkitd.sock, /run/xbuildkitd.sock, 0", "buildkitd.sock, /run/buildkitd.sockx, 0",
        "buildkitd.sock, /run/buildkitd.sock/x, 0", "buildkitd.sock, @buildkitd.sock, 0",
        "buildkitd.sock, /run/my buildkitd.sock, 0", "buildkitd.sock, /run/my own/buildkitd.sock, 1",
        "buildkitd.sock, /run/buildkitdXsock, 0", "buildkit/buildkitd.sock, /run/buildkit/buildkitd.sock, 1",
        "kit/buildkitd.sock, /run/buildkit/buildkitd.sock, 0", "/run/b.sock, /run/b.sock, 1",
        "/run/b.sock, /var/run/b.sock, 0", "@b.sock, @b.sock, 1", "b 7 * 7.sock, /run/b 7 * 7.sock, 1",
        "\u00e9.sock, /run/\u00e9.sock, 1", "\ufffd\ufffd.sock, /run/\u00e9.sock, 1", "\u00e9.sock, /run/e.sock, 0",
        "buildkitd.sock, /run/\u00c5/buildkitd.sock, 1"}) // whose second byte in UTF-8 ends a line in Latin-1
    void aSocketIsAPathOrTheEndOfOne(String socket, String path, int count) throws Exception {
        Seen expected = Seen.ofUnix(count, false);
        assertThat(readAs(socket, Source.ss, ssUnix("u_str ESTAB 0 0 " + path + " 77 * 78"))).isEqualTo(expected);
        assertThat(readAs(socket, Source.procfs, procfsUnix("0: 00000003 00000000 00000000 0001 03 77 " + path)))
                .isEqualTo(expected);
        assertThat(readAs(socket, Source.netstat, netstatUnix("unix 3 [ ] STREAM CONNECTED 77 " + path)))
                .isEqualTo(expected);
    }

    @ParameterizedTest
    @CsvSource({"192.0.2.10:1234, 192.0.2.7:12345, 1", "192.0.2.10:1234, 192.0.2.7:1234, 1",
        "192.0.2.10:12345, 192.0.2.7:41234, 0", "192.0.2.10:12345, 192.0.2.7:1234, 0",
        "192.0.2.10:41234, 192.0.2.7:1234, 0", "192.0.2.10:234, 192.0.2.7:1234, 0",
        "192.0.2.10:11234, 192.0.2.7:41234, 0", "2001:db8::1234:41234, 2001:db8::1234:1234, 0"})
    void onlyTheLocalPortAndOnlyTheWholePortCounts(String local, String peer, int count) throws Exception {
        assertThat(read(Source.netstat, table(Source.netstat, "tcp 0 0 " + local + " " + peer + " ESTABLISHED")).tcp())
                .isEqualTo(count);
        assertThat(read(Source.ss, table(Source.ss, "tcp ESTAB 0 0 " + local + " " + peer)).tcp()).isEqualTo(count);
        assertThat(read(Source.procfs, table(Source.procfs, "0: " + hex(local) + " " + hex(peer) + " 01 0")).tcp())
                .isEqualTo(count);
    }

    private static Stream<Arguments> samePeer() {
        return Stream.of(
                arguments("10.0.0.7", "10.0.0.7", "10.0.0.7", "0700000A"),
                arguments("10.0.0.7", "::ffff:10.0.0.7", "[::ffff:10.0.0.7]", "0000000000000000FFFF00000700000A"),
                arguments("[::1]", "::1", "[::1]", "00000000000000000000000001000000"),
                arguments("[2001:db8:1:0:1::]", "2001:db8:1:0:1::", "[2001:db8:1:0:1::]",
                        "B80D0120000001000000010000000000"),
                arguments("[1:2:3:4:5:6:7:8]", "1:2:3:4:5:6:7:8", "[1:2:3:4:5:6:7:8]",
                        "02000100040003000600050008000700"));
    }

    @ParameterizedTest(name = "{0} of {1}")
    @MethodSource("samePeer")
    void namesAPeerTheSameWhicheverTheSource(String expected, String netstat, String ss, String procfs)
            throws Exception {
        assertThat(List.of(
                read(Source.netstat, table(Source.netstat, "tcp 0 0 :::1234 " + netstat + ":41234 ESTABLISHED")),
                read(Source.ss, table(Source.ss, "tcp ESTAB 0 0 [::]:1234 " + ss + ":41234")),
                read(Source.procfs, table(Source.procfs, "0: 0A0200C0:04D2 " + procfs + ":A112 01 0"))))
                .containsOnly(Seen.ofTcp(1, false, expected + ":41234"));
    }

    @ParameterizedTest
    @EnumSource
    void countsARowThatTheKernelShowsAgainOnce(Source source) throws Exception {
        String one = row(source, established(source));
        String other = one.replace("41234", "41235").replace("A112", "A113");
        assertThat(read(source, table(source, one, other, one, other)).tcp()).isEqualTo(2);
        String unix = "unix 3 [ ] STREAM CONNECTED 77 /run/buildkitd.sock";
        assertThat(read(Source.netstat, netstatUnix(unix, unix.replace("77", "78"), unix)).unix()).isEqualTo(2);
    }

    @Test
    void takesHeadingsWithoutRowsForNoConnection() throws Exception {
        assertThat(List.of(read(Source.netstat, table(Source.netstat)), read(Source.ss, table(Source.ss)),
                read(Source.ss, "Netid State Recv-Q Send-Q Local Address:Port Peer Address:PortProcess\n"),
                read(Source.procfs, tcp(""), tcp6(""), procfsUnix()))).containsOnly(Seen.ofTcp(0, false));
    }

    @ParameterizedTest
    @EnumSource
    void understandsLinesThatEndWithACarriageReturn(Source source) throws Exception {
        assertThat(read(source, table(source, row(source, established(source))).replace("\n", "\r\n")).tcp()).isOne();
    }

    /** States that there are not: in another language, cut off, of another kernel. */
    @ParameterizedTest
    @CsvSource({"netstat, VERBUNDEN", "netstat, ESTABLISHE", "netstat, ESTABLISHEDX", "netstat, E", "netstat, 01",
        "ss, ESTABLISHED", "ss, ESTA", "ss, E", "ss, UNDEF", "procfs, 0Z", "procfs, 00", "procfs, 0C", "procfs, 1",
        "procfs, 011", "procfs, FF"})
    void refusesOnlyOfBuildkitdsPortAStateThatThereIsNot(Source source, String state) throws Exception {
        String row = row(source, state);
        assertThatThrownBy(() -> read(source, table(source, row))).isInstanceOf(IOException.class)
                .hasMessageContaining("not a socket table: ").hasMessageContaining(state);
        assertThat(read(source, table(source, row.replace(":1234", ":9").replace(":04D2", ":0009"))))
                .isEqualTo(Seen.ofTcp(0, false));
    }

    // ---- What is refused -------------------------------------------------------------------------------------------

    private static Stream<Arguments> noTables() {
        return Stream.of(Source.values()).flatMap(source -> {
            String row = row(source, established(source));
            String heading = table(source);
            return Map.ofEntries(
                    Map.entry("nothing", ""),
                    Map.entry("an empty line", "\n"),
                    Map.entry("rows without a heading", row + "\n"),
                    Map.entry("a heading cut off", heading.substring(0, heading.length() - 20)),
                    Map.entry("a heading without its newline", heading.strip()),
                    Map.entry("a last row cut off", heading + row + "\n" + row.substring(0, row.length() / 2)),
                    Map.entry("a last row without its newline", heading + row + "\n" + row),
                    Map.entry("a row cut off before its newline", table(source, row.substring(0, 25), row)),
                    Map.entry("a row of another port cut off before its state", table(source, source == Source.ss
                            ? "tcp ESTAB 0 0 192.0.2.10:9 " : row.substring(0, row.indexOf(established(source)))
                                    .replace(":1234", ":9").replace(":04D2", ":0009"), row)),
                    Map.entry("a state that is no word", table(source, source == Source.ss
                            ? row.replace("ESTAB", "ESTAB?")
                            : row.replace(" " + established(source), " " + established(source) + "?"))),
                    Map.entry("an address without a port",
                            table(source, row.replace(":1234", "").replace(":04D2", ""))),
                    Map.entry("a peer without a port", table(source, row.replace(":41234", "").replace(":A112", ""))),
                    Map.entry("a peer of another port without one", table(source, row.replace(":41234", "")
                            .replace(":A112", "").replace(":1234", ":9").replace(":04D2", ":0009"))),
                    Map.entry("an error message instead of a table", "ss: cannot open netlink socket\n"),
                    Map.entry("an error message before the table", "sh: warning\n" + table(source, row)),
                    Map.entry("an error message between the rows", table(source, row, "read error: I/O error", row)),
                    Map.entry("an error message after the rows", table(source, row, "killed")),
                    Map.entry("an empty line between the rows", table(source, row, "", row)),
                    Map.entry("a second heading", table(source, row) + table(source, row)),
                    Map.entry("garbage", "1234 ESTABLISHED :1234 ESTAB 04D2 01\n".repeat(3)),
                    Map.entry("bytes", "\u007fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>\0\1\0\0\0\n\377\376\r\n"),
                    Map.entry("a table with NUL bytes", table(source, row.replace(" ", "\0"))),
                    Map.entry("a line without an end", "x".repeat(10_000)),
                    Map.entry("a row without an end", heading + row + " ".repeat(10_000)))
                    .entrySet().stream()
                    .map(text -> arguments(text.getKey() + ", " + source, source, text.getValue()));
        });
    }

    private static Stream<Arguments> noTablesOfTheTools() {
        return Stream.of(
                arguments("usage of BusyBox", Source.netstat, """
                        netstat: invalid option -- 'p'
                        BusyBox v1.35.0 (Debian 1:1.35.0-4+deb12u1+b1) multi-call binary.

                        Usage: netstat [-ral] [-tuwx] [-en]
                        """),
                arguments("net-tools in German", Source.netstat, """
                        Aktive Internetverbindungen (Server und stehende Verbindungen)
                        Proto Recv-Q Send-Q Local Address           Foreign Address         State     \s
                        tcp        0      0 192.0.2.10:1234         198.51.100.7:41234      VERBUNDEN \s
                        """),
                arguments("net-tools, heading of one line only", Source.netstat,
                        "Active Internet connections (servers and established)\n"),
                arguments("net-tools, a kernel without TCP", Source.netstat,
                        table(Source.netstat) + "netstat: no support for `AF INET (tcp)' on this system.\n"),
                arguments("the table of another tool", Source.ss, EVERY_STATE_NET_TOOLS),
                arguments("the table of another tool", Source.netstat, EVERY_STATE_SS),
                arguments("the table of another tool", Source.procfs, EVERY_STATE_BUSYBOX),
                arguments("net-tools, no unix sockets", Source.netstat, EVERY_STATE_NET_TOOLS),
                arguments("net-tools, a unix heading cut off", Source.netstat, EVERY_STATE_NET_TOOLS
                        + "Active UNIX domain sockets (servers and established)\n"),
                arguments("net-tools, unix sockets only", Source.netstat,
                        UNIX_NET_TOOLS.substring(UNIX_NET_TOOLS.indexOf("Active UNIX"))),
                arguments("ss, no unix sockets", Source.ss, EVERY_STATE_SS),
                arguments("an address of a length that no address has", Source.procfs,
                        tcp("   0: 0A0200C0:04D2 00000A0700000A07:A112 01 00000000:00000000\n")));
    }

    /** Of each table of unix sockets its last row, spoilt. */
    private static Stream<Arguments> spoiltRowsOfUnixSockets() {
        String netstat = "unix  3      [ ]         STREAM     CONNECTED     77 /run/buildkitd.sock";
        String ss = "u_str ESTAB  0      0      /run/buildkitd.sock 77 * 78";
        String procfs = "0: 00000003 00000000 00000000 0001 03 77 /run/buildkitd.sock";
        return Stream.of(
                arguments("no inode", Source.netstat, netstatUnix(netstat.replace("77 ", ""))),
                arguments("no inode", Source.ss, ssUnix(ss.replace("77 ", ""))),
                arguments("no inode", Source.procfs, procfsUnix(procfs.replace("77 ", ""))),
                arguments("cut off", Source.netstat, netstatUnix(netstat.substring(0, 40))),
                arguments("cut off", Source.ss, ssUnix(ss.substring(0, 45))),
                arguments("cut off", Source.procfs, procfsUnix(procfs.substring(0, 30))),
                arguments("no newline", Source.netstat, netstatUnix() + netstat),
                arguments("no newline", Source.ss, ssUnix() + ss),
                arguments("no newline", Source.procfs, procfsUnix() + procfs),
                arguments("a state that is no word", Source.netstat,
                        netstatUnix(netstat.replace("CONNECTED", "connected"))),
                arguments("a state that is no word", Source.ss, ssUnix(ss.replace("ESTAB", "estab"))),
                arguments("a state that is no word", Source.procfs,
                        procfsUnix(procfs.replace(" 03 ", " ? "))),
                arguments("a peer by its path, after which an inode cannot be told from a path", Source.ss,
                        ssUnix(ss.replace("*", "/run/client"))),
                arguments("an error message", Source.netstat, netstatUnix(netstat, "netstat: error")),
                arguments("an error message", Source.ss, ssUnix(ss, "u_str: error")),
                arguments("an error message", Source.procfs, procfsUnix(procfs, "I/O error")));
    }

    @ParameterizedTest(name = "{0}, {1}")
    @MethodSource({"noTables", "noTablesOfTheTools", "spoiltRowsOfUnixSockets"})
    void refusesWhatIsNotAWholeTable(String name, Source source, String text) {
        for (int chunk : CHUNKS) {
            assertThatThrownBy(() -> read(look(source, "buildkitd.sock"), chunk, text))
                    .isInstanceOf(IOException.class);
        }
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    /** The headings, and these rows of TCP. */
    private static String table(Source source, String... rows) {
        if (source == Source.procfs) {
            return tcp("") + lines(rows);
        }
        String all = source == Source.ss ? withNetid(EVERY_STATE_SS) : EVERY_STATE_NET_TOOLS;
        return all.substring(0, all.indexOf('\n', all.indexOf("Local Address")) + 1) + lines(rows)
                + (source == Source.ss ? "" : NO_UNIX);
    }

    /** Adds the column that ss prints in front when it is asked for unix sockets too. */
    private static String withNetid(String table) {
        return table.replaceAll("(?m)^(?=[A-Z])", "tcp   ").replaceFirst("tcp  ", "Netid");
    }

    private static String netstatUnix(String... rows) {
        return table(Source.netstat) + lines(rows);
    }

    private static String ssUnix(String... rows) {
        return table(Source.ss, rows);
    }

    private static String procfsUnix(String... rows) {
        return "Num       RefCount Protocol Flags    Type St Inode Path\n" + lines(rows);
    }

    private static String lines(String... rows) {
        return Stream.of(rows).map(row -> row + "\n").collect(Collectors.joining());
    }

    private static String established(Source source) {
        return source == Source.netstat ? "ESTABLISHED" : source == Source.ss ? "ESTAB" : "01";
    }

    /** A row of a TCP socket of the watched port, whose peer is 192.0.2.7:41234. */
    private static String row(Source source, String state) {
        return switch (source) {
            case netstat -> "tcp        0      0 192.0.2.10:1234         192.0.2.7:41234         " + state;
            case ss -> "tcp   %-10s 0      0         192.0.2.10:1234     192.0.2.7:41234       ".formatted(state);
            case procfs -> "   0: 0A0200C0:04D2 070200C0:A112 " + state + " 00000000:00000000" + REST_OF_ROW;
        };
    }

    private static String hex(String end) {
        return "00000000:%04X".formatted(Integer.parseInt(end.substring(end.lastIndexOf(':') + 1)));
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

    private static Seen read(Source source, String... tables) throws Exception {
        return readAs("buildkitd.sock", source, tables);
    }

    /** Reads the tables one after the other, as a whole and in pieces, which must make no difference. */
    private static Seen readAs(String socket, Source source, String... texts) throws Exception {
        List<Seen> seen = new ArrayList<>();
        for (int chunk : CHUNKS) {
            Look look = look(source, socket);
            for (String text : texts) {
                read(look, chunk, text);
            }
            List<String> peers = new ArrayList<>();
            for (String ends : look.tcp()) {
                peers.add(source.peerOf(ends));
            }
            seen.add(new Seen(look.tcp().size(), look.unix().size(), !look.tcpListeners().isEmpty(),
                    !look.unixListeners().isEmpty(), peers));
        }
        assertThat(seen).containsOnly(seen.get(0));
        return seen.get(0);
    }

    private static Look look(Source source, String socket) {
        BuildkitPrestop settings = new BuildkitPrestop();
        settings.port = PORT;
        settings.socket = socket;
        settings.source = BuildkitPrestop.ConnectionSource.auto;
        return new Sockets(settings).newLook(source);
    }

    private static void read(Look look, int chunk, String text) throws Exception {
        List<Pattern> headings = look.source().headings;
        if (look.source() == Source.procfs) {
            headings = text.startsWith("Num") ? headings.subList(1, 2) : headings.subList(0, 1);
        }
        // The kernel and the tools write a path's bytes as they are.
        ByteArrayInputStream in = new ByteArrayInputStream(text.getBytes(StandardCharsets.UTF_8));
        look.read(buffer -> in.read(buffer, 0, Math.min(buffer.length, chunk)), headings);
    }
}
