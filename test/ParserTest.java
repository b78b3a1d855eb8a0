import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.*;
import java.nio.charset.StandardCharsets;
import java.util.*;
import java.util.function.Consumer;
import java.util.regex.*;
import java.util.stream.Stream;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/**
 * What the hook reads from the kernel's tables, which it takes whole or not at all, and what it finds in the output of
 * net-tools, BusyBox and ss, whatever else stands there.
 *
 * <p>The tables are what net-tools 2.10, BusyBox 1.35, iproute2 6.1 and Linux 6.18 printed, all four of the same
 * sockets in a network namespace of their own. The peers' ends were played by a program on a TUN device, so that the
 * sockets stay in states that otherwise pass in no time. Left out are the blanks at the ends of lines, and the columns
 * of the kernel's tables behind those of the queues. The watched port is 1234, the socket buildkitd.sock.
 */
class ParserTest {

    // ---- The same sockets, as each source shows them ---------------------------------------------------------------

    private static final String NET_TOOLS = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State
            tcp        0      0 192.0.2.10:1234         0.0.0.0:*               LISTEN
            tcp        0      1 192.0.2.10:44522        203.0.113.9:1234        SYN_SENT
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41239      CLOSING
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41233      SYN_RECV
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41238      LAST_ACK
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41235      FIN_WAIT2
            tcp        0      0 192.0.2.10:1234         198.51.100.7:1234       ESTABLISHED
            tcp        1      0 192.0.2.10:1234         198.51.100.7:41237      CLOSE_WAIT
            tcp       77    300 192.0.2.10:1234         198.51.100.7:12345      ESTABLISHED
            tcp        0      1 192.0.2.10:1234         198.51.100.7:41234      FIN_WAIT1
            tcp        0      0 192.0.2.10:234          203.0.113.9:1234        ESTABLISHED
            tcp        0      0 192.0.2.10:12345        203.0.113.9:1234        ESTABLISHED
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41236      TIME_WAIT
            tcp        0      0 192.0.2.10:41234        203.0.113.9:1234        ESTABLISHED
            tcp6       0      0 :::1234                 :::*                    LISTEN
            tcp6       0      0 192.0.2.11:1234         198.51.100.7:41234      ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1:0:1:::50007  ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1:1234:5:51234 ESTABLISHED
            tcp6       0      0 2001:db8::1234:41234    2001:db8::1:1234:1234   ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1::1234:12340  ESTABLISHED
            tcp6       0      0 fe80::1:1234            fe80::7:45678           ESTABLISHED
            Active UNIX domain sockets (servers and established)
            Proto RefCnt Flags       Type       State         I-Node   Path
            unix  2      [ ACC ]     STREAM     LISTENING     8595484  /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595487  /run/my
            unix  3      [ ]         DGRAM      CONNECTED     8595490  /run/dgram/buildkitd.sock
            unix  2      [ ]         DGRAM                    8595492  /run/log/buildkitd.sock
            unix  2      [ ACC ]     SEQPACKET  LISTENING     8595493  /run/seq/buildkitd.sock
            unix  3      [ ]         SEQPACKET  CONNECTED     8595494  /run/q/buildkitd.sock
            unix  3      [ ]         SEQPACKET  CONNECTED     8595495
            unix  2      [ ]         STREAM                   8595496  /run/idle/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595486  /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595488  /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTING    0        /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595489
            unix  3      [ ]         DGRAM      CONNECTED     8595491
            unix  3      [ ]         STREAM     CONNECTED     8595485  @buildkitd.sock
            """;

    /** What BusyBox printed: it cuts nothing off, and writes IPv4 in another way where the listener is IPv6's. */
    private static final String BUSYBOX = NET_TOOLS.replace("tcp6 ", "tcp  ")
            .replace("192.0.2.11:1234         198.51.100.7:41234     ",
                    "::ffff:192.0.2.11:1234  ::ffff:198.51.100.7:41234")
            .replace("2001:db8:1:1234:5:51234", "2001:db8:1:1234:5:6:7:8:51234")
            .replace("/run/my", "/run/my buildkitd.sock").replace("    0        /run", "         0 /run")
            .replaceAll("(\\d{7}|I-Node)  +", "$1 ");

    private static final String SS = """
            Netid State      Recv-Q Send-Q             Local Address:Port                 Peer Address:Port   Process
            u_str LISTEN     1      5            /run/buildkitd.sock 8595484                         * 0
            u_str ESTAB      0      0         /run/my buildkitd.sock 8595487                         * 8595488
            u_dgr ESTAB      0      0      /run/dgram/buildkitd.sock 8595490                         * 8595491
            u_dgr UNCONN     0      0        /run/log/buildkitd.sock 8595492                         * 0
            u_seq LISTEN     0      5        /run/seq/buildkitd.sock 8595493                         * 0
            u_seq ESTAB      0      0          /run/q/buildkitd.sock 8595494                         * 8595495
            u_seq ESTAB      0      0                              * 8595495                         * 8595494
            u_str UNCONN     0      0       /run/idle/buildkitd.sock 8595496                         * 0
            u_str ESTAB      0      0            /run/buildkitd.sock 8595486                         * 8595485
            u_str ESTAB      0      0            /run/buildkitd.sock 8595488                         * 8595487
            u_str ESTAB      0      0                              * 8595489                         * 0
            u_dgr ESTAB      0      0                              * 8595491                         * 8595490
            u_str ESTAB      0      0                @buildkitd.sock 8595485                         * 8595486
            tcp   LISTEN     0      64                    192.0.2.10:1234                      0.0.0.0:*
            tcp   SYN-SENT   0      1                     192.0.2.10:44522                 203.0.113.9:1234
            tcp   CLOSING    1      1                     192.0.2.10:1234                 198.51.100.7:41239
            tcp   SYN-RECV   0      0                     192.0.2.10:1234                 198.51.100.7:41233
            tcp   LAST-ACK   1      1                     192.0.2.10:1234                 198.51.100.7:41238
            tcp   FIN-WAIT-2 0      0                     192.0.2.10:1234                 198.51.100.7:41235
            tcp   ESTAB      0      0                     192.0.2.10:1234                 198.51.100.7:1234
            tcp   CLOSE-WAIT 1      0                     192.0.2.10:1234                 198.51.100.7:41237
            tcp   ESTAB      77     300                   192.0.2.10:1234                 198.51.100.7:12345
            tcp   FIN-WAIT-1 0      1                     192.0.2.10:1234                 198.51.100.7:41234
            tcp   ESTAB      0      0                     192.0.2.10:234                   203.0.113.9:1234
            tcp   ESTAB      0      0                     192.0.2.10:12345                 203.0.113.9:1234
            tcp   TIME-WAIT  0      0                     192.0.2.10:1234                 198.51.100.7:41236
            tcp   ESTAB      0      0                     192.0.2.10:41234                 203.0.113.9:1234
            tcp   LISTEN     0      64                             *:1234                            *:*
            tcp   ESTAB      0      0            [::ffff:192.0.2.11]:1234        [::ffff:198.51.100.7]:41234
            tcp   ESTAB      0      0                 [2001:db8::10]:1234           [2001:db8:1:0:1::]:50007
            tcp   ESTAB      0      0                 [2001:db8::10]:1234    [2001:db8:1:1234:5:6:7:8]:51234
            tcp   ESTAB      0      0               [2001:db8::1234]:41234          [2001:db8::1:1234]:1234
            tcp   ESTAB      0      0                 [2001:db8::10]:1234           [2001:db8:1::1234]:12340
            tcp   ESTAB      0      0                 [fe80::1]%eth0:1234                    [fe80::7]:45678
            """;

    private static final String TCP = """
              sl  local_address rem_address   st tx_queue rx_queue
               0: 0A0200C0:04D2 00000000:0000 0A 00000000:00000000
               1: 0A0200C0:ADEA 097100CB:04D2 02 00000001:00000000
               2: 0A0200C0:04D2 076433C6:A117 0B 00000001:00000001
               3: 0A0200C0:04D2 076433C6:A111 03 00000000:00000000
               4: 0A0200C0:04D2 076433C6:A116 09 00000001:00000001
               5: 0A0200C0:04D2 076433C6:A113 05 00000000:00000000
               6: 0A0200C0:04D2 076433C6:04D2 01 00000000:00000000
               7: 0A0200C0:04D2 076433C6:A115 08 00000000:00000001
               8: 0A0200C0:04D2 076433C6:3039 01 0000012C:0000004D
               9: 0A0200C0:04D2 076433C6:A112 04 00000001:00000000
              10: 0A0200C0:00EA 097100CB:04D2 01 00000000:00000000
              11: 0A0200C0:3039 097100CB:04D2 01 00000000:00000000
              12: 0A0200C0:04D2 076433C6:A114 06 00000000:00000000
              13: 0A0200C0:A112 097100CB:04D2 01 00000000:00000000
            """;

    private static final String TCP6 = """
              sl  local_address                         remote_address                        st tx_queue rx_queue
               0: 00000000000000000000000000000000:04D2 00000000000000000000000000000000:0000 0A 00000000:00000000
               1: 0000000000000000FFFF00000B0200C0:04D2 0000000000000000FFFF0000076433C6:A112 01 00000000:00000000
               2: B80D0120000000000000000010000000:04D2 B80D0120000001000000010000000000:C357 01 00000000:00000000
               3: B80D0120000000000000000010000000:04D2 B80D0120341201000600050008000700:C822 01 00000000:00000000
               4: B80D0120000000000000000034120000:A112 B80D0120000000000000000034120100:04D2 01 00000000:00000000
               5: B80D0120000000000000000010000000:04D2 B80D0120000001000000000034120000:3034 01 00000000:00000000
               6: 000080FE000000000000000001000000:04D2 000080FE000000000000000007000000:B26E 01 00000000:00000000
            """;

    private static final String UNIX = """
            Num       RefCount Protocol Flags    Type St Inode Path
            000000000a6e1ede: 00000002 00000000 00010000 0001 01 8595484 /run/buildkitd.sock
            000000001100c409: 00000003 00000000 00000000 0001 03 8595487 /run/my buildkitd.sock
            00000000c3f17200: 00000003 00000000 00000000 0002 03 8595490 /run/dgram/buildkitd.sock
            000000007963c725: 00000002 00000000 00000000 0002 01 8595492 /run/log/buildkitd.sock
            00000000c74797e6: 00000002 00000000 00010000 0005 01 8595493 /run/seq/buildkitd.sock
            00000000eefd4257: 00000003 00000000 00000000 0005 03 8595494 /run/q/buildkitd.sock
            00000000bfbc577c: 00000003 00000000 00000000 0005 03 8595495
            00000000a8e90c24: 00000002 00000000 00000000 0001 01 8595496 /run/idle/buildkitd.sock
            000000009ab53b4e: 00000003 00000000 00000000 0001 03 8595486 /run/buildkitd.sock
            000000001a713c6d: 00000003 00000000 00000000 0001 03 8595488 /run/buildkitd.sock
            00000000b2430fdf: 00000003 00000000 00000000 0001 02     0 /run/buildkitd.sock
            00000000bfda2d5b: 00000003 00000000 00000000 0001 03 8595489
            0000000031172244: 00000003 00000000 00000000 0002 03 8595491
            00000000a23e9506: 00000003 00000000 00000000 0001 03 8595485 @buildkitd.sock
            """;

    /** The connections of TCP; net-tools cuts off a long address. */
    private static final String CONNECTIONS = "7 connections to port 1234 from 198.51.100.7:1234, 198.51.100.7:12345,"
            + " 198.51.100.7:41234, [2001:db8:1:0:1::]:50007, [2001:db8:1:1234:5:6:7:8]:51234,"
            + " [2001:db8:1::1234]:12340, [fe80::7]:45678";
    private static final List<Endpoint> ENDPOINTS =
            List.of(Endpoint.port(1234, true), Endpoint.socket("buildkitd.sock", true));
    private static final Map<KernelTable, String> KERNEL =
            new EnumMap<>(Map.of(KernelTable.tcp, TCP, KernelTable.tcp6, TCP6, KernelTable.unix, UNIX));

    // ---- What is seen ----------------------------------------------------------------------------------------------

    /** However many bytes a read gives at once, and though the kernel may show a row twice. */
    @ParameterizedTest
    @ValueSource(ints = {1, 7, Integer.MAX_VALUE})
    void theKernelShowsTheConnectionsOfBuildkitdAndNothingElse(int most) throws IOException {
        Look look = new Look(ENDPOINTS);
        for (int time = 1; time <= 2; time++) {
            for (KernelTable table : KERNEL.keySet()) { read(table, KERNEL.get(table), most, look::add); }
        }
        assertThat(look.describe(99)).isEqualTo(CONNECTIONS + " and 3 to buildkitd.sock");
        assertThat(look.withoutListener()).isEmpty();
    }

    static Stream<Arguments> outputs() {
        return Stream.of(
                Arguments.of(Tool.netstat, NET_TOOLS,
                        CONNECTIONS.replace("5:6:7:8]", "5]") + " and 3 to buildkitd.sock"),
                Arguments.of(Tool.netstat, BUSYBOX, CONNECTIONS + " and 3 to buildkitd.sock"),
                // It does not show the client that was not accepted yet.
                Arguments.of(Tool.ss, SS, CONNECTIONS + " and 2 to buildkitd.sock"));
    }

    @ParameterizedTest
    @MethodSource("outputs")
    void aToolShowsTheSameWhateverElseItPrints(Tool tool, String output, String seen) throws IOException {
        assertThat(seen(tool, output)).isEqualTo(seen);
        String odd = "tcp SYN-SENT 0 -308262530 192.0.2.10:44522 203.0.113.9:1234\n"
                + "tcp ESTAB 0 0 127.0.0.1:* 127.0.0.1:1234\ntcp 0 0 0.0.0.0:99999 0.0.0.0:* ESTABLISHED\n"
                + "\nkilled\n\u007fELF\2\1\1\0\0\376\377\nunix 3 [ ] STREAM CONNECTED\nu_str ESTAB 0 0\n";
        String mixed = output.lines().map(line -> line + "      \r\n" + odd).reduce(odd, String::concat);
        assertThat(seen(tool, mixed.substring(0, mixed.length() - 1))).isEqualTo(seen);
    }

    @ParameterizedTest
    @CsvSource({"ss, tcp ESTAB -5 -308262530 [::1]:1234 [::1]:7", "ss, tcp ESTAB 0 0 [fe80::1]%eth0:1234 [fe80::7]:7",
        "ss, tcp ESTAB 0 0 *:1234 10.0.0.7:7 users:((x))", "ss, u_str ESTAB -1 -1 /run/buildkitd.sock 7 * 0",
        "netstat, tcp 0 -1 :::1234 10.0.0.7:7 ESTABLISHED 7/x", "netstat, tcp6 0 0 :::1234 ::1:7 ESTABLISHED",
        "netstat, unix 3 [ W ACC N ] STREAM CONNECTED 0 /run/buildkitd.sock",
        "netstat, unix 3 [ ] STREAM CONNECTING 0 buildkitd.sock"})
    void aToolsRowThatIsOddIsSeenAllTheSame(Tool tool, String row) throws IOException {
        assertThat(seen(tool, row)).startsWith("1 connection to ");
    }

    /** States of TCP that no table above shows of the watched port, and of unix sockets that none shows at all. */
    @ParameterizedTest
    @ValueSource(strings = {"02", "07", "00000000 0001 00", "00000000 0001 04", "00000000 0003 03",
        "00000000 0004 03", "00010000 0005 01"})
    void countsNoRareStateEither(String state) throws IOException {
        assertThat(seen(table(state), row(state))).startsWith("0 connections");
    }

    /** Of another kernel, perhaps. */
    @ParameterizedTest
    @ValueSource(strings = {"00", "0C", "FF", "00000000 0001 05", "00000000 0006 03", "00100000 0001 03"})
    void refusesOnlyOfBuildkitdAStateThatThereIsNot(String state) {
        String row = row(state);
        assertThat(isRead(table(state), heading(table(state)) + row)).isFalse();
        String other = row.replace(":04D2", ":0009").replace("/buildkitd", "/other");
        assertThat(isRead(table(state), heading(table(state)) + other)).isTrue();
    }

    @ParameterizedTest
    @CsvSource({
        "buildkitd.sock, /run/buildkit/buildkitd.sock, 1", "buildkitd.sock, buildkitd.sock, 1",
        "buildkitd.sock, /run/xbuildkitd.sock, 0", "buildkitd.sock, /run/buildkitd.sockx, 0",
        "buildkitd.sock, /run/my own/buildkitd.sock, 1", "buildkitd.sock, /run/buildkitdXsock, 0",
        "buildkit/buildkitd.sock, /run/buildkit/buildkitd.sock, 1", "/run/b.sock, /run/b.sock, 1",
        "/run/b.sock, /var/run/b.sock, 0", "@b.sock, @b.sock, 1", "b 7 * 7.sock, /run/b 7 * 7.sock, 1",
        "\u00e9.sock, /run/\u00e9.sock, 1", "\ufffd\ufffd.sock, /run/\u00e9.sock, 1", "\u00e9.sock, /run/e.sock, 0",
        "buildkitd.sock, /run/\u00c5/buildkitd.sock, 1"}) // whose second byte in UTF-8 ends a line in Latin-1
    void aSocketIsAPathOrTheEndOfOne(String socket, String path, int count) throws IOException {
        Look look = new Look(List.of(Endpoint.socket(socket, true)));
        read(KernelTable.unix, heading(KernelTable.unix) + "0: 00000003 00000000 00000000 0001 03 77 " + path + "\n", 7,
                look::add);
        assertThat(look.count()).isEqualTo(count);
        look = new Look(List.of(Endpoint.socket(socket, true)));
        rows(Tool.ss, "u_str ESTAB 0 0 " + path + " 77 * 78\n").forEach(look::add);
        assertThat(look.count()).isEqualTo(count);
        rows(Tool.netstat, "unix 3 [ ] STREAM CONNECTED 79 " + path + "\n").forEach(look::add);
        assertThat(look.count()).isEqualTo(2 * count);
    }

    // ---- What is refused -------------------------------------------------------------------------------------------

    @ParameterizedTest
    @EnumSource
    void refusesATableThatIsCutOffAnywhereButBehindARow(KernelTable table) {
        String text = KERNEL.get(table);
        for (int end = 0; end <= text.length(); end++) {
            String start = text.substring(0, end);
            assertThat(isRead(table, start)).as(start).isEqualTo(start.endsWith("\n"));
        }
    }

    /** A socket's name may hold a newline, and behind it what looks like a row of another table. */
    @ParameterizedTest
    @EnumSource
    void refusesALineThatIsNoRowOfThisTable(KernelTable table) {
        List<String> oddLines = new ArrayList<>(List.of("", "killed", "\u007fELF\2\1\1\0\0\376\377",
                "0: 0A0200C0:04D2 00000A0700000A07:A112 01 0 ")); // no address is so long
        KERNEL.values().forEach(text -> oddLines.add(text.lines().findFirst().orElseThrow()));
        KERNEL.forEach((other, text) -> {
            if (other != table) { oddLines.addAll(text.lines().toList()); }
        });
        List<String> lines = KERNEL.get(table).lines().toList();
        for (String oddLine : oddLines) {
            for (int i : List.of(0, 1, 2, lines.size())) {
                List<String> more = new ArrayList<>(lines);
                more.add(i, oddLine);
                assertThat(isRead(table, String.join("\n", more) + "\n")).as(oddLine).isFalse();
            }
        }
        assertThat(isRead(table, String.join("\n", lines.subList(1, lines.size())) + "\n")).isFalse();
        assertThatThrownBy(() -> read(table, heading(table) + "killed\n", 7, row -> { }))
                .isInstanceOf(IOException.class).hasMessageEndingWith(table + " has a row that cannot be read: killed");
    }

    /** Behind the state of TCP anything may stand. */
    @ParameterizedTest
    @CsvSource({"tcp, 0: 0A0200C0:0009 070200C0:A112 01,  0", "unix, 0: 00000003 00000000 00000000 0002 03 77, ''"})
    void refusesARowThatLacksAWordOrAColonThoughItIsNotOfBuildkitd(KernelTable table, String row, String end) {
        assertThat(isRead(table, heading(table) + row + " " + end + "\n")).isTrue();
        for (Matcher part = Pattern.compile("[^ :]+|:").matcher(row); part.find(); ) {
            String rest = row.substring(0, part.start()) + row.substring(part.end());
            assertThat(isRead(table, heading(table) + rest + " " + end + "\n")).as(rest).isFalse();
        }
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    /** TCP's, or that of unix sockets, whose states have several words. */
    private static KernelTable table(String state) { return state.contains(" ") ? KernelTable.unix : KernelTable.tcp; }

    private static String heading(KernelTable table) { return KERNEL.get(table).split("(?<=\n)")[0]; }

    /** A row of buildkitd. */
    private static String row(String state) {
        return (state.contains(" ") ? "0: 00000003 00000000 %s 77 /run/buildkitd.sock\n"
                : "0: 0A0200C0:04D2 070200C0:A112 %s 0\n").formatted(state);
    }

    private static String seen(KernelTable table, String row) throws IOException {
        Look look = new Look(ENDPOINTS);
        read(table, heading(table) + row, 7, look::add);
        return look.describe(99);
    }

    private static String seen(Tool tool, String output) throws IOException {
        Look look = new Look(ENDPOINTS);
        rows(tool, output).forEach(look::add);
        return look.describe(99);
    }

    private static List<Row> rows(Tool tool, String output) throws IOException {
        return tool.parse(new BufferedReader(new InputStreamReader(bytes(output), StandardCharsets.ISO_8859_1)));
    }

    private static boolean isRead(KernelTable table, String text) {
        try {
            read(table, text, Integer.MAX_VALUE, new Look(ENDPOINTS)::add);
            return true;
        } catch (IOException | IllegalStateException refused) {
            return false;
        }
    }

    /** At most so many bytes at once. */
    private static void read(KernelTable table, String text, int most, Consumer<Row> rows) throws IOException {
        table.parse(new FilterInputStream(bytes(text)) {
            @Override
            public int read(byte[] buffer) throws IOException {
                return in.read(buffer, 0, Math.min(buffer.length, most));
            }
        }, rows);
    }

    /** The kernel and the tools write a path's bytes as they are. */
    private static InputStream bytes(String text) {
        return new ByteArrayInputStream(text.getBytes(StandardCharsets.UTF_8));
    }
}
